"""From measured cases to what a report says of them: ratios, likeness, verdicts, notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.compare.measure.calls import TEXT_ENCODER, VAE_DECODER, Asked
from sdkd.compare.measure.cases import Case
from sdkd.compare.measure.quality import judge_engine, likeness
from sdkd.compare.measure.references import ReferenceImages
from sdkd.compare.measure.results import Result, Stair
from sdkd.compare.measure.scores import lpips_here
from sdkd.compare.measure.stats import Ratio, Spread, gain, speedup
from sdkd.compare.measure.subjects import TEACHER, Subject, rounding_of, size_on_disk
from sdkd.compare.measure.timing import Sample
from sdkd.models.replacements import short_vae
from sdkd.targets.registry import check_target

if TYPE_CHECKING:
    from PIL.Image import Image

Judge = Callable[[Sequence["Image"], Sequence[str]], Mapping[str, float]]
"""Reads images and gives, for each name (`shape`, `colour`), the fraction of prompts that came out right."""


def all_baselines(cases: Mapping[str, Case], baseline: str | None) -> dict[str, dict[str, str]]:
    """By label, what every subject's speed is divided by; see `find_baselines`."""
    subjects = [case.subject for case in cases.values()]
    return {label: find_baselines(case.subject, subjects, baseline) for label, case in cases.items()}


def find_baselines(subject: Subject, subjects: Sequence[Subject], baseline: str | None) -> dict[str, str]:
    """What a subject's speed is divided by: `eager` of its model, the `teacher`'s eager, the asked `baseline`.

    Own eager is run as the subject is. Eager in float32 before eager in half; a subject is never its own baseline, and
    what caches steps none at all.
    """
    whole = [other for other in subjects if other.is_eager and not other.caches]
    eager = sorted(whole, key=lambda other: not other.is_reference)
    same = [other for other in eager if (other.model_key, other.run) == (subject.model_key, subject.run)]
    own = next((other.label for other in same), None)
    teacher = next((other.label for other in eager if other.role == TEACHER), None)
    chosen = baseline if baseline in [other.label for other in subjects] else None  # it may have been left out
    found = {"eager": own, "teacher": teacher, "baseline": chosen}
    return {name: label for name, label in found.items() if label not in (None, subject.label)}


Samples = Sequence[Sequence[Sample]]


def _seconds(samples: Samples) -> list[list[float]]:
    return [[sample.seconds for sample in part] for part in samples]


def _cpu_seconds(samples: Samples) -> list[list[float]]:
    return [[sample.cpu_s for sample in part] for part in samples]


def _ratios(over: Mapping[str, Samples], own: Samples) -> dict[str, Ratio]:
    """The speed-up over each baseline that was measured in enough rounds."""
    found = {name: speedup(_seconds(samples), _seconds(own)) for name, samples in over.items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def result_of(
    case: Case,
    cases: Mapping[str, Case],
    references: ReferenceImages,
    baselines: Mapping[str, str],
    judge: Judge | None,
    asked: Asked,
) -> Result:
    """What was found for one case; `baselines`: by kind, the label of each that its speed is divided by."""
    subject, against = case.subject, references.to_own(case.subject, case.images)
    rule = references.to_own_cached(subject, case.images) if subject.caches else against
    over = {name: cases[label] for name, label in baselines.items()}
    rounding = rounding_of(subject)
    assert case.opened is not None
    assert case.memory is not None
    assert case.first is not None
    return Result(
        subject=subject,
        run=dataclasses.replace(case.run, scheduler=case.opened.scheduler),
        unet_batch=case.request(asked).unet_batch,
        unet_step_ms=Spread.of(_seconds(case.step_samples), 1000),
        unet_step_cpu_ms=Spread.of(_cpu_seconds(case.step_samples), 1000),
        image_s=Spread.of(_seconds(case.image_samples), 1 / asked.batch),
        image_cpu_s=Spread.of(_cpu_seconds(case.image_samples), 1 / asked.batch),
        text_encoder_ms=Spread.of(_seconds(case.parts[TEXT_ENCODER]), 1000),
        vae_decode_ms=Spread.of(_seconds(case.parts[VAE_DECODER]), 1000),
        load_s=case.opened.load_s,
        first_call_s=case.first.wall_s,
        unet_parameters=case.opened.unet_parameters,
        parameters=case.opened.parameters,
        bytes_on_disk=size_on_disk(subject),
        memory=case.memory,
        repeatable=case.repeatable,
        unet_calls=case.unet_calls,
        images_per_call=asked.batch,
        attention=case.attention,
        against_eager=against,
        against_teacher=references.to_teacher(subject, case.images),
        verdict=judge_engine(subject, rule, references.half_to_own(subject), rounding),
        step_speedup=_ratios({name: other.step_samples for name, other in over.items()}, case.step_samples),
        image_speedup=_ratios({name: other.image_samples for name, other in over.items()}, case.image_samples),
        judged=None if judge is None else dict(judge(case.images, asked.image_prompts)),
        rounding=rounding,
    )


def unlike_calls(cases: Mapping[str, Case], baselines: Mapping[str, Mapping[str, str]], asked: Asked) -> list[str]:
    """A note where a ratio is one of UNet calls of different batches, as those of a guided and an unguided step are."""
    latents = {label: case.request(asked).unet_batch for label, case in cases.items()}
    pairs = [(label, over) for label, found in baselines.items() for over in found.values()]
    unlike = [(label, over) for label, over in pairs if latents[label] != latents[over]]
    if not unlike:
        return []
    label, over = unlike[0]
    return [
        f"Steps with and without guidance are different calls ({latents[over]} of {over}, {latents[label]} of {label}, "
        "in latents): their ratio is of one call each, that of images tells what an image gains"
    ]


def climb(labels: Sequence[str], cases: Mapping[str, Case], results: Sequence[Result]) -> tuple[Stair, ...]:
    """The staircase of these labels: each measured row against the one above and against the first."""
    rows = {row.subject.label: row for row in results}
    found = list[Stair]()
    kept = [label for label in labels if label in rows]
    for place, label in enumerate(kept):
        row, before, first = rows[label], kept[max(place - 1, 0)], kept[0]
        own = _seconds(cases[label].image_samples)
        peaks = (row.memory.peak_gpu, row.memory.peak_rss)
        stair = Stair(
            label=label,
            change=change_between(rows[before] if place else None, row),
            image_s=row.image_s.median,
            vae_share=row.vae_decode_ms.median / (1000 * row.images_per_call * row.image_s.median),
            parameters=row.parameters,
            peak_bytes=next((peak for peak in peaks if peak is not None), None),
            judged=row.judged_mean,
            ok=None if row.verdict is None else row.verdict.ok,
        )
        if place:
            times = _seconds(cases[before].image_samples), _seconds(cases[first].image_samples)
            over_previous, over_first = (gain(other, own) for other in times)
            to_first = likeness(cases[label].images, cases[first].images, first, lpips_here())
            stair = dataclasses.replace(stair, over_previous=over_previous, over_first=over_first, to_first=to_first)
        found.append(stair)
    return tuple(found)


def change_between(before: Result | None, row: Result) -> str:
    """In words what a subject adds to another one, or what the first one is."""
    subject, run = row.subject, dataclasses.replace(row.run, scheduler=None)
    if before is None:
        return f"{subject.model_label}, {subject.runs_as}, {run}"
    then, run_then = before.subject, dataclasses.replace(before.run, scheduler=None)
    pairs = (
        (str(then.model), str(subject.model), subject.model_label),
        (before.run, row.run, str(run) if run != run_then else str(row.run.scheduler)),
        (_others(then), _others(subject), _others(subject) or "its own VAE"),
        (then.loras, subject.loras, "LoRA" if subject.loras else "no LoRA"),
        (then.runs_as, subject.runs_as, _runs_otherwise(then, subject)),
    )
    return ", ".join(words for old, new, words in pairs if old != new) or "nothing"


def _runs_otherwise(then: Subject, now: Subject) -> str:
    """Where a subject runs; only the precision where it is the same engine in eight bits instead of another."""
    engines = then.has_engines and now.has_engines and check_target(then.target) == check_target(now.target)
    if now.is_quantized and engines and then.cache_interval == now.cache_interval:
        return f"{now.precision} instead of {then.precision} ({now.runs_as})"
    return now.runs_as


def _others(subject: Subject) -> str:
    """The parts that stand in for a model's own, in words."""
    return ", ".join(short_vae(name) if part == "vae" else Path(name).name for part, name in subject.replaced)
