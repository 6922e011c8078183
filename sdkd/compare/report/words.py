"""Sentences about a comparison: what was compared, what came out, where."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from sdkd.compare.measure.limits import EXPLAINED
from sdkd.compare.measure.results import Report, Result
from sdkd.compare.measure.subjects import STUDENT
from sdkd.compare.measure.timing import MOST_WARM_CALLS, MOST_WARM_SECONDS


@dataclass(frozen=True)
class Finding:
    """One figure worth a headline: the value, what it is of, and its fine print."""

    value: str
    text: str
    note: str = ""
    tone: str = ""


def listing(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`, each name once."""
    kept = list(dict.fromkeys(names))
    return kept[0] if len(kept) == 1 else f"{', '.join(kept[:-1])} and {kept[-1]}"


def plural(count: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def models(report: Report) -> str:
    """The models, each once."""
    return listing(row.subject.model_label for row in report.results)


def asked(report: Report) -> str:
    """On what the models ran, and what each was asked for."""
    setup, targets = report.setup, listing(_target_word(row.subject.runs_as) for row in report.results)
    runs = _runs(report)
    each = [text if len(runs) == 1 else f"{text} ({listing(names)})" for text, names in runs]
    height, width = setup.size
    batch = "" if setup.batch == 1 else f", {setup.batch} images per call"
    return (
        f"on {targets}: {plural(len(setup.prompts), 'prompt')} from the same noise, "
        f"{width} × {height} px, {'; '.join(each)}{batch}"
    )


def _runs(report: Report) -> list[tuple[str, list[str]]]:
    """Steps and guidance scale in words, and the model of every subject that has them; its label where that differs."""
    found: dict[str, list[Result]] = {}
    for row in report.results:
        found.setdefault(f"{plural(row.run.steps, 'step')}, guidance {row.run.guidance_scale:g}", []).append(row)
    models = [name for rows in found.values() for name in {row.subject.model_label for row in rows}]
    return [
        (text, [name if models.count(name := row.subject.model_label) == 1 else row.subject.label for row in rows])
        for text, rows in found.items()
    ]


def sentence(report: Report) -> str:
    """What was compared, in one sentence."""
    return f"{models(report)} {asked(report)}"


def _target_word(target: str) -> str:
    return target.replace("eager", "eager PyTorch", 1).replace("compile", "torch.compile", 1)


def machine_line(report: Report) -> str:
    """The device, its share of the machine and the date."""
    here = report.environment
    device = here["gpu"]["gpu"] if report.setup.timing == "CUDA events" and here.get("gpu") else here["cpu"]
    return f"{device}, {plural(here['cores_usable'], 'core')}, {here['date_utc'][:10]}"


def notes(report: Report) -> list[str]:
    """What a reader should know first: how quiet the machine was, and the report's own notes."""
    return [note for note in (noise_note(report), *report.notes) if note]


def _settings(report: Report) -> str:
    return "; ".join(f"{row.subject.label}, {row.run}" for row in report.results)


def noise_note(report: Report) -> str | None:
    """A warning when the machine had other work when it began, or calls spread so widely that it had some later."""
    found = []
    if report.noisy:
        found.append(
            f"The machine was busy: calls of {len(report.noisy)} of {plural(len(report.results), 'subject')} spread "
            "widely (p90 − p10 is more than half the median). Trust the intervals, or measure again when it is quiet"
        )
    if report.busy_before is not None:
        found.append(f"The machine was not quiet when this began: {report.busy_before}")
    return ". ".join(found) or None


def findings(report: Report) -> list[Finding]:
    """At most four headline figures, each only where the report supports it."""
    found = [_fastest(report), _smallest(report), _verdicts(report), _captions(report)]
    return [finding for finding in found if finding is not None]


def _fastest(report: Report) -> Finding | None:
    kinds = [("UNet step", {row.subject.label: row.step_speedup for row in report.results})]
    if report.mixed:  # where a step is not the whole any more, images come first
        kinds.insert(0, ("image", {row.subject.label: row.image_speedup for row in report.results}))
    for (unit, ratios), name in itertools.product(kinds, ("teacher", "eager", "baseline")):
        if found := {label: each[name] for label, each in ratios.items() if name in each}:
            label = max(found, key=lambda one: found[one].value)
            ratio, over = found[label], report.baselines[label][name]
            note = f"{ratio.confidence:.0%} interval {ratio.low:.2f}–{ratio.high:.2f}"
            value, words = ("tie", "per") if ratio.tie else (f"{ratio.value:.2f}×", "as fast per")
            return Finding(value, f"{words} {unit}: {label} over {over}", note)
    return None


def _smallest(report: Report) -> Finding | None:
    small = min(report.results, key=lambda row: row.unet_parameters)
    large = max(report.results, key=lambda row: row.unet_parameters)
    if small.unet_parameters == large.unet_parameters:
        return None
    share = 1 - small.unet_parameters / large.unet_parameters
    sizes = f"{small.unet_parameters / 1e6:,.1f} M of {large.unet_parameters / 1e6:,.1f} M"
    return Finding(
        f"−{share:.0%}", f"UNet parameters: {small.subject.model_label} instead of {large.subject.model_label}", sizes
    )


def _verdicts(report: Report) -> Finding | None:
    judged = [row for row in report.results if row.verdict and row.verdict.ok is not None]
    if not judged:
        return None
    good = sum(bool(row.verdict and row.verdict.ok) for row in judged)
    worst = [row.against_eager.psnr_min_db for row in judged if row.against_eager and row.subject.precision == "fp32"]
    kinds = dict.fromkeys((row.subject.precision, row.subject.judged_in) for row in judged)
    notes = [f"worst fp32 image {min(worst):.0f} dB PSNR"] if worst else []
    halves = [f"{own} as close as eager {half}" for own, half in kinds if own != "fp32"] if good == len(judged) else []
    further = [f"{row.subject.label} further" for row in report.results if row.verdict and row.verdict.further]
    note = ", ".join([*notes, *halves, *further])
    tone = "good" if good == len(judged) else "bad"
    return Finding(f"{good} of {len(judged)}", "engines make the images of eager PyTorch", note, tone)


def _captions(report: Report) -> Finding | None:
    judged = [row for row in report.results if row.judged]
    students = [row for row in judged if row.subject.role == STUDENT] or judged
    if not students:
        return None
    best = max(students, key=lambda row: row.judged_mean or 0.0)
    details = ", ".join(f"{name} {value:.0%}" for name, value in (best.judged or {}).items())
    return Finding(f"{best.judged_mean:.0%}", f"of caption attributes right: {best.subject.label}", details)


def method(report: Report) -> list[str]:
    """How the figures came about, for the page."""
    setup = report.setup
    memory = "all pipelines open at once"
    if not setup.open_together:
        memory = "one pipeline in memory at a time, opened again in every round"
    place = "every subject in a fresh one of its own" if setup.isolated else "all subjects in one"
    batches = sorted({row.unet_batch for row in report.results})
    words = {True: "guidance: both halves in one call", False: "one latent per image"}
    guided = " or ".join(f"{count} ({words[count > setup.batch]})" for count in batches)
    fewest = min(row.unet_step_ms.count for row in report.results)
    return [
        f"UNet step: one call with batch {guided}, {setup.timing}, at least {fewest} calls each, "
        "after warm-up until three calls in a row agree within 10% "
        f"({MOST_WARM_CALLS} calls or {MOST_WARM_SECONDS:g} s at most).",
        "Rounds: every round times each subject in a new random order, after a call thrown away or warm-up, so that "
        f"a drifting machine hits all alike ({memory}).",
        f"Ratios: medians, with a {setup.confidence:.0%} bootstrap interval over rounds and samples; a tie is an "
        "interval that holds 1.",
        f"Processes: {place}; load, first image and steady state are timed apart.",
        "Parts: text encoder and VAE are timed like UNet steps, in fewer rounds; the rest of an image is what the "
        "medians of its parts leave of its own.",
        "Images: equal noise for every subject, drawn on the CPU in float32; whole images are timed again in rounds.",
        *([f"Settings: {_settings(report)}."] if report.mixed else []),
        "Likeness: PSNR and SSIM of 8-bit images; an identical image counts as 100 dB in a mean. An engine is compared "
        "with eager fp32 of its own model; a student with its teacher in columns of their own.",
        *([f"Limit: {EXPLAINED}"] if report.ceilings else []),
        *(f"Not measured: {what}." for what in report.not_measured),
    ]
