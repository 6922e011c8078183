"""What a comparison found, as dataclasses and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.bundle.quantized import Quantized
from sdkd.compare.measure.against import THRESHOLD, Against, weigh
from sdkd.compare.measure.calls import Asked
from sdkd.compare.measure.earlier import Earlier, parse_report
from sdkd.compare.measure.environment import Memory, busy
from sdkd.compare.measure.limits import Ceilings, Limit, Work
from sdkd.compare.measure.quality import Likeness, Verdict
from sdkd.compare.measure.stats import Gain, Ratio, Spread
from sdkd.compare.measure.subjects import Failed, Subject
from sdkd.errors import EngineError, InputError, ParityError, SdkdError
from sdkd.models.generation import Generation

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA = 4
NOISY_WIDTH = 0.5  # (p90 - p10) / median of the step latency


@dataclass(frozen=True, kw_only=True)
class Setup(Asked):
    """What was asked, equal for all subjects, and how it was measured."""

    runs: int
    min_seconds: float
    timing: str
    open_together: bool  # all pipelines in memory at once; otherwise one at a time, opened again for every round
    confidence: float
    isolated: bool = False  # every subject in a process of its own
    staircase: tuple[str, ...] = ()  # labels of subjects of which each adds one change to the one before


@dataclass(frozen=True)
class Result:
    """What was found for one subject."""

    subject: Subject
    run: Generation  # what it was drawn with, the class of its scheduler included
    unet_batch: int  # of a UNet call: twice the images with guidance, conditional and unconditional in one call
    unet_step_ms: Spread
    unet_step_cpu_ms: Spread  # CPU time of all threads
    image_s: Spread  # per image: a call's time over its images
    image_cpu_s: Spread
    text_encoder_ms: Spread  # of one pipeline call: its prompts to embeddings
    vae_decode_ms: Spread  # of one pipeline call: its latents to pixels
    load_s: float
    first_call_s: float
    unet_parameters: int
    parameters: int
    bytes_on_disk: int | None
    memory: Memory
    repeatable: bool | None  # the same seed gave the same image again; None: it was not tried
    unet_calls: int  # of one pipeline call; a scheduler may make more than steps
    images_per_call: int = 1
    attention: str | None = None  # eager only
    against_eager: Likeness | None = None
    against_teacher: Likeness | None = None
    verdict: Verdict | None = None
    step_speedup: Mapping[str, Ratio] = field(default_factory=dict)  # over `eager`, `teacher`, `baseline`
    image_speedup: Mapping[str, Ratio] = field(default_factory=dict)
    judged: Mapping[str, float] | None = None
    work: Work | None = None  # of one UNet call
    limit: Limit | None = None  # what that call reached
    clip_scores: tuple[float, ...] | None = None  # per image, with its prompt
    rounding: Quantized | None = None  # of an engine in eight bits, as its build recorded it

    @property
    def group(self) -> tuple[str, Generation]:
        """What is drawn together: the model, and how it is run."""
        return self.subject.model_key, self.run

    @property
    def rest_ms(self) -> float:
        """What one pipeline call takes beside its timed parts: loop, scheduler, pixels to images; from medians."""
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
class Stair:
    """One row of a staircase: what it adds to the row above, and where that leads. The first row has no gains.

    `image_s`: end to end, the median; `vae_share`: of the VAE in it; `peak_bytes`: of its process, on the GPU where it
    runs there, None where that is not known; `to_first`: its images against those of the first row.
    """

    label: str
    change: str
    image_s: float
    vae_share: float
    parameters: int
    peak_bytes: int | None
    over_previous: Gain | None = None
    over_first: Gain | None = None
    to_first: Likeness | None = None
    judged: float | None = None
    ok: bool | None = None  # whether its rule holds; None where there is none

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        plain = {name: _figure_json(value) for name, value in vars(self).items()}
        gains = {name: getattr(self, name) for name in ("over_previous", "over_first")}
        return plain | {name: found and {**vars(found), "tie": found.tie} for name, found in gains.items()}


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
    stairs: tuple[Stair, ...] = ()  # of `setup.staircase`, those that were measured

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
        again = (
            f"sdkd build-engine {shlex.quote(str(subject.model))} --target {subject.target} "
            f"--output {shlex.quote(str(subject.bundle))} --overwrite"
        )
        few = f"Compare more than {len(self.setup.prompts)} prompts to be sure, then use the fp32 engine, or export and"
        repair = f"Export and build the engine again, with: {again}"
        if subject.is_compiled:
            repair = "Leave the target compile out, or try another version of PyTorch"
        elif subject.is_quantized:
            repair = f"Use the {subject.judged_in} engine, or calibrate with more images and build again: {again}"
        elif subject.precision != "fp32":
            repair = f"{few} build again: {again}"
        return (
            f"{len(self.broken)} of {len(self.results)} subjects broke a rule. {subject.label!r}: {verdict.found}, but "
            f"the rule is: {verdict.rule}. {repair}."
        )

    @property
    def mixed(self) -> bool:
        """Whether subjects were drawn with different steps or guidance scales."""
        return len({(row.run.steps, row.run.guidance_scale) for row in self.results}) > 1

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
        return replace(self, against=weigh(then, now, threshold))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary (finite numbers only), units in field names, raw samples kept; see docs."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "ok": self.ok,
            "noisy": list(self.noisy),
            "busy_before": self.busy_before,
            "notes": list(self.notes),
            "setup": {
                name: list(value) if isinstance(value, tuple) else value for name, value in vars(self.setup).items()
            },
            "environment": dict(self.environment),
            "ceilings": {precision: vars(found) for precision, found in self.ceilings.items()},
            "not_measured": list(self.not_measured),
            "staircase": [stair.to_json() for stair in self.stairs] or None,
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
        "run": None if subject.run is None else subject.run.to_json(),
        "cache_interval": subject.cache_interval,
    }


FIGURES = (
    "unet_step_ms", "unet_step_cpu_ms", "image_s", "image_cpu_s", "text_encoder_ms", "vae_decode_ms", "unet_calls",
    "rest_ms", "images_per_s", "load_s", "first_call_s", "unet_parameters", "parameters", "bytes_on_disk", "repeatable",
    "attention", "against_eager", "against_teacher", "verdict", "judged",
)  # fmt: skip  # of a result, under their own names in its JSON


def _result_json(row: Result, report: Report) -> dict[str, Any]:
    subject, memory, baselines = row.subject, row.memory, report.baselines.get(row.subject.label, {})
    return {
        **_subject_json(subject),
        "run": row.run.to_json(),
        "unet_batch": row.unet_batch,
        **{name: _figure_json(getattr(row, name)) for name in FIGURES},
        "rss_growth_bytes": memory.growth,
        **{f"{name}_bytes": getattr(memory, name) for name in ("base_rss", "peak_rss", "peak_gpu", "peak_torch")},
        "step_speedup": {name: _ratio_json(ratio, baselines[name]) for name, ratio in row.step_speedup.items()},
        "image_speedup": {name: _ratio_json(ratio, baselines[name]) for name, ratio in row.image_speedup.items()},
        "clip_scores": None if row.clip_scores is None else {"mean": row.clip_mean, "per_image": list(row.clip_scores)},
        "limit": {**vars(row.work), **vars(row.limit)} if row.work and row.limit else None,
        "images": [image_name(subject, number) for number in range(len(report.images[subject.label]))],
        **({} if row.rounding is None else {"rounding": rounding_json(row.rounding)}),
    }


def _figure_json(value: Any) -> Any:
    """A number or text as it is; a spread with its samples, a likeness without infinities."""
    if isinstance(value, Spread):
        figures = {name: getattr(value, name) for name in ("median", "p10", "p90", "p99", "count")}
        return {**figures, "samples": [list(part) for part in value.samples]}
    if isinstance(value, Likeness):
        names = ("reference", "identical", "ssim_mean", "ssim_min", "lpips_mean", "lpips_max")
        return {
            **{name: getattr(value, name) for name in names},
            "psnr_mean_db": None if value.identical else value.psnr_mean_db,
            "psnr_min_db": None if value.identical else value.psnr_min_db,
            "max_abs_levels": value.max_abs,
            "per_image": [vars(image) for image in value.per_image],
        }
    if isinstance(value, Verdict):
        return {
            "ok": value.ok,
            "rule": value.rule,
            "found": value.found,
            **({"further": True} if value.further else {}),
        }
    return value


def rounding_json(found: Quantized) -> dict[str, Any]:
    """What the build of an engine in eight bits recorded, JSON-ready; `sdkd inspect --json` has it layer by layer."""
    return {
        "scheme": dict(found.asked.scheme),
        "rounded_layers": found.rounded_layers,
        "float_layers": len(found.float_layers),
        "quality": asdict(found.quality),
        "speed": None if found.speed is None else asdict(found.speed),
    }


def _ratio_json(ratio: Ratio, baseline: str) -> dict[str, Any]:
    return {**vars(ratio), "tie": ratio.tie, "over": baseline}
