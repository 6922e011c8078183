"""What a comparison found, as dataclasses and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.compare.measure.against import THRESHOLD, Against, differences_of
from sdkd.compare.measure.earlier import Earlier, parse_report
from sdkd.compare.measure.environment import Memory, busy
from sdkd.compare.measure.limits import Ceilings, Limit, Work
from sdkd.compare.measure.quality import Likeness, Verdict
from sdkd.compare.measure.stats import Ratio, Spread
from sdkd.compare.measure.subjects import Failed, Subject
from sdkd.errors import EngineError, InputError, ParityError, SdkdError

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA = 3
NOISY_WIDTH = 0.5  # (p90 - p10) / median of the step latency


@dataclass(frozen=True)
class Setup:
    """What was asked: equal for all subjects."""

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    size_px: int
    seed: int
    unet_batch: int  # twice the images per call with guidance: conditional and unconditional in one call
    runs: int
    min_seconds: float
    scheduler: str
    timing: str
    open_together: bool  # all pipelines in memory at once; otherwise one at a time, opened again for every round
    confidence: float
    batch: int = 1  # images per call
    isolated: bool = False  # every subject in a process of its own
    width_px: int | None = None  # None: as wide as high, `size_px`

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.size_px, self.width_px or self.size_px

    @property
    def image_prompts(self) -> tuple[str, ...]:
        """The prompt of every image, in the order of a report's images."""
        return self.prompts * self.batch


@dataclass(frozen=True)
class Result:
    """What was found for one subject."""

    subject: Subject
    unet_step_ms: Spread
    unet_step_cpu_ms: Spread
    image_s: Spread  # per image: a call's time over its images
    load_s: float
    first_call_s: float
    unet_parameters: int
    parameters: int
    bytes_on_disk: int | None
    rss_growth_bytes: int  # of this process, from before loading to after the first image
    repeatable: bool  # the same seed gave the same image again
    attention: str | None = None  # eager only
    against_eager: Likeness | None = None
    against_teacher: Likeness | None = None
    verdict: Verdict | None = None
    step_speedup: Mapping[str, Ratio] = field(default_factory=dict)  # over `eager`, `teacher`, `baseline`
    image_speedup: Mapping[str, Ratio] = field(default_factory=dict)
    judged: Mapping[str, float] | None = None
    image_cpu_s: Spread | None = None  # CPU time of all threads
    text_encoder_ms: Spread | None = None  # of one pipeline call: its prompts to embeddings
    vae_decode_ms: Spread | None = None  # of one pipeline call: its latents to pixels
    unet_calls: int = 0  # of one pipeline call; a scheduler may make more than steps
    images_per_call: int = 1
    memory: Memory = field(default_factory=Memory)
    work: Work | None = None  # of one UNet call
    limit: Limit | None = None  # what that call reached
    clip_scores: tuple[float, ...] | None = None  # per image, with its prompt

    @property
    def rest_ms(self) -> float | None:
        """What one pipeline call takes beside its timed parts: loop, scheduler, pixels to images; from medians."""
        if self.text_encoder_ms is None or self.vae_decode_ms is None:
            return None
        parts = self.text_encoder_ms.median + self.unet_calls * self.unet_step_ms.median + self.vae_decode_ms.median
        return 1000 * self.images_per_call * self.image_s.median - parts

    @property
    def images_per_s(self) -> float:
        """End to end: text encoder, all steps, scheduler and VAE."""
        return 1 / self.image_s.median

    @property
    def judged_mean(self) -> float | None:
        """Mean of the judge's fractions."""
        return sum(self.judged.values()) / len(self.judged) if self.judged else None

    @property
    def clip_mean(self) -> float | None:
        """Mean CLIP score of the images with their prompts."""
        return sum(self.clip_scores) / len(self.clip_scores) if self.clip_scores else None


@dataclass(frozen=True)
class Report:
    """A whole comparison; `images` holds, by label, `batch` images per prompt: first all first ones."""

    setup: Setup
    results: tuple[Result, ...]
    environment: Mapping[str, Any]
    images: Mapping[str, Sequence[Image]]
    baselines: Mapping[str, Mapping[str, str]]  # label -> {"eager": label of its baseline, "teacher": ..., ...}
    command: str | None = None
    notes: tuple[str, ...] = ()
    against: Against | None = None  # an earlier report
    ceilings: Mapping[str, Ceilings] = field(default_factory=dict)  # by precision
    not_measured: tuple[str, ...] = ()  # scores that lack weights here, and how to get them
    failed: tuple[Failed, ...] = ()  # subjects that have no result

    @property
    def broken(self) -> tuple[Result, ...]:
        """Results whose rule does not hold."""
        return tuple(result for result in self.results if result.verdict and result.verdict.ok is False)

    @property
    def ok(self) -> bool:
        """Whether no rule is broken, and no subject failed."""
        return not self.broken and not self.failed

    def check(self, page: Path | None = None) -> None:
        """Raise one error when a subject failed, a rule is broken or an earlier report was better.

        `page` is where to look. EngineError, ParityError or what `Against.problem` gives, in this order; all are said
        in one message.
        """
        found: list[SdkdError] = [EngineError(self._failure())] if self.failed else []
        found += [ParityError(self._broken_rule())] if self.broken else []
        worse = None if self.against is None else self.against.problem()
        found += [] if worse is None else [worse]
        if found:
            words = ". ".join([str(error).rstrip(".") for error in found] + ([f"See {page}"] if page else []))
            raise type(found[0])(f"{words}.") from (self.failed[0].error if self.failed else None)

    def _failure(self) -> str:
        first, count = self.failed[0], len(self.failed)
        return f"{count} of {count + len(self.results)} subjects failed. {first.subject.label!r}: {first.reason}"

    def _broken_rule(self) -> str:
        subject, verdict = self.broken[0].subject, self.broken[0].verdict
        assert verdict is not None
        return (
            f"{len(self.broken)} of {len(self.results)} subjects broke a rule. {subject.label!r}: {verdict.found}, but "
            f"the rule is: {verdict.rule}. {self._repair(subject)}."
        )

    def _repair(self, subject: Subject) -> str:
        if subject.is_compiled:
            return "Leave the target compile out, or try another version of PyTorch"
        again = (
            f"sdkd build-engine {shlex.quote(str(subject.model))} --target {subject.target} "
            f"--output {shlex.quote(str(subject.bundle))} --overwrite"
        )
        if subject.precision == "fp32":
            return f"Export and build the engine again, with: {again}"
        few = len(self.setup.prompts)
        return (
            f"Compare more than {few} prompts to be sure, then use the fp32 engine, or export and build again: {again}"
        )

    @property
    def busy_before(self) -> str | None:
        """In words how busy the machine was with other work when it began, None when it was quiet; see `busy`."""
        return busy(self.environment)

    @property
    def noisy(self) -> tuple[str, ...]:
        """Labels whose step latency spread so widely that the machine was not quiet."""
        return tuple(row.subject.label for row in self.results if row.unet_step_ms.relative_width > NOISY_WIDTH)

    def result(self, label: str) -> Result:
        """The result of a subject; InputError lists the labels."""
        found = {row.subject.label: row for row in self.results}
        if label not in found:
            raise InputError(f"the report has no subject {label!r}: it has {', '.join(found)}")
        return found[label]

    def held_against(self, then: Earlier, threshold: float = THRESHOLD) -> Report:
        """A copy with its comparison with an earlier one; where all subjects in common failed, `check` says so."""
        now = parse_report(self.to_json(), "this one")
        return replace(self, against=differences_of(then, now, threshold))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary (finite numbers only), units in field names, raw samples kept; see docs."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "ok": self.ok,
            "noisy": list(self.noisy),
            "busy_before": self.busy_before,
            "notes": list(self.notes),
            "setup": vars(self.setup) | {"prompts": list(self.setup.prompts)},
            "environment": dict(self.environment),
            "ceilings": {precision: vars(found) for precision, found in self.ceilings.items()},
            "not_measured": list(self.not_measured),
            "results": [_result_json(row, self) for row in self.results],
            "failed": [{**_subject_json(one.subject), "reason": one.reason} for one in self.failed],
            "against": None if self.against is None else self.against.to_json(),
        }


def image_name(subject: Subject, number: int) -> str:
    """Path of an image, relative to the report."""
    return f"images/{subject.slug}-{number}.png"


def _subject_json(subject: Subject) -> dict[str, Any]:
    """What a report says of a subject, measured or not."""
    return {
        "label": subject.label,
        "model": subject.model_key,
        "target": subject.target,
        "precision": subject.precision,
        "role": subject.role,
        "bundle": None if subject.bundle is None else str(subject.bundle),
    }


def _result_json(row: Result, report: Report) -> dict[str, Any]:
    subject, baselines = row.subject, report.baselines.get(row.subject.label, {})
    return {
        **_subject_json(subject),
        "unet_step_ms": _spread_json(row.unet_step_ms),
        "unet_step_cpu_ms": _spread_json(row.unet_step_cpu_ms),
        "image_s": _spread_json(row.image_s),
        "image_cpu_s": _maybe_spread(row.image_cpu_s),
        "text_encoder_ms": _maybe_spread(row.text_encoder_ms),
        "vae_decode_ms": _maybe_spread(row.vae_decode_ms),
        "unet_calls": row.unet_calls,
        "rest_ms": row.rest_ms,
        "images_per_s": row.images_per_s,
        "load_s": row.load_s,
        "first_call_s": row.first_call_s,
        "unet_parameters": row.unet_parameters,
        "parameters": row.parameters,
        "bytes_on_disk": row.bytes_on_disk,
        "rss_growth_bytes": row.rss_growth_bytes,
        "base_rss_bytes": row.memory.base_rss,
        "peak_rss_bytes": row.memory.peak_rss,
        "peak_gpu_bytes": row.memory.peak_gpu,
        "peak_torch_bytes": row.memory.peak_torch,
        "repeatable": row.repeatable,
        "attention": row.attention,
        "step_speedup": {name: _ratio_json(ratio, baselines[name]) for name, ratio in row.step_speedup.items()},
        "image_speedup": {name: _ratio_json(ratio, baselines[name]) for name, ratio in row.image_speedup.items()},
        "against_eager": _likeness_json(row.against_eager),
        "against_teacher": _likeness_json(row.against_teacher),
        "verdict": None if row.verdict is None else vars(row.verdict),
        "judged": None if row.judged is None else dict(row.judged),
        "clip_scores": None if row.clip_scores is None else {"mean": row.clip_mean, "per_image": list(row.clip_scores)},
        "limit": _limit_json(row),
        "images": [image_name(subject, number) for number in range(len(report.images[subject.label]))],
    }


def _spread_json(spread: Spread) -> dict[str, Any]:
    samples = [list(part) for part in spread.samples]
    figures = {"median": spread.median, "p10": spread.p10, "p90": spread.p90, "p99": spread.p99}
    return {**figures, "count": spread.count, "samples": samples}


def _maybe_spread(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else _spread_json(spread)


def _ratio_json(ratio: Ratio, baseline: str) -> dict[str, Any]:
    return {**vars(ratio), "tie": ratio.tie, "over": baseline}


def _limit_json(row: Result) -> dict[str, Any] | None:
    if row.work is None or row.limit is None:
        return None
    return {**vars(row.work), **vars(row.limit)}


def _likeness_json(found: Likeness | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "reference": found.reference,
        "identical": found.identical,
        "psnr_mean_db": None if found.identical else found.psnr_mean_db,
        "psnr_min_db": None if found.identical else found.psnr_min_db,
        "max_abs_levels": found.max_abs,
        "ssim_mean": found.ssim_mean,
        "ssim_min": found.ssim_min,
        "lpips_mean": found.lpips_mean,
        "lpips_max": found.lpips_max,
        "per_image": [vars(image) for image in found.per_image],
    }
