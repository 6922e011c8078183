"""`compare`: open the subjects, make the same images with each, time them in interleaved rounds, judge the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from sdkd.compare.measure.beside import complete
from sdkd.compare.measure.calls import TEXT_ENCODER, VAE_DECODER, Request
from sdkd.compare.measure.cases import (
    Case,
    LoadedSubjects,
    first_images,
    first_opened,
    fit_together,
    measured,
    nothing_left,
    time_images,
    time_parts,
)
from sdkd.compare.measure.environment import environment, state_after
from sdkd.compare.measure.isolation import prepare_children
from sdkd.compare.measure.pictures import Size
from sdkd.compare.measure.quality import judge_engine
from sdkd.compare.measure.references import ReferenceImages, find_references
from sdkd.compare.measure.refusals import check_asked, check_models
from sdkd.compare.measure.results import Report, Result, Setup
from sdkd.compare.measure.runner import RunConfig
from sdkd.compare.measure.stats import CONFIDENCE, Ratio, Spread, speedup
from sdkd.compare.measure.subjects import TEACHER, Failed, Subject, check_subjects, has_random_weights, size_on_disk
from sdkd.compare.measure.timing import Sample, Timer
from sdkd.core.console import Progress, quiet, within
from sdkd.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Judge = Callable[[Sequence["Image"], Sequence[str]], Mapping[str, float]]
"""Reads images and gives, for each name (`shape`, `colour`), the fraction of prompts that came out right."""

RUNS = 30
MIN_SECONDS = 1.0
IMAGE_RUNS = 3
SHARES = {"images": (0.0, 0.6), "steps": (0.6, 0.9), "references": (0.9, 1.0)}  # of the time, about


def compare(
    subjects: Sequence[Subject],
    *,
    prompts: Sequence[str],
    steps: int = 25,
    guidance_scale: float = 7.5,
    size: int | Size | None = None,
    seed: int = 0,
    runs: int = RUNS,
    min_seconds: float = MIN_SECONDS,
    image_runs: int = IMAGE_RUNS,
    baseline: str | None = None,
    batch: int = 1,
    scheduler: str | None = None,
    judge: Judge | None = None,
    device: str | None = None,
    command: str | None = None,
    notes: Sequence[str] = (),
    failed: Sequence[Failed] = (),
    isolate: bool = False,
    load_before: Sequence[float] | None = None,
    progress: Progress = quiet,
) -> Report:
    """Measure subjects side by side: speed, size, and how far each one's images are from eager PyTorch's.

    `size`: image side, or height and width, in pixels (default: the first model's own). `runs`: UNet calls timed per
    subject, at least; `image_runs`: whole calls timed. `baseline`: label of one more subject to give ratios to.
    `batch`: images per call. `scheduler`: for all subjects, as `sdkd generate` takes it (default: each model's own).
    `judge` reads the images (caption accuracy). Image n starts from `seed + n`. `isolate`: every subject in a fresh
    process of its own, which measures the memory of each and survives their crashes; a script that asks for it needs
    `if __name__ == "__main__":`.
    `load_before`: the machine's load average before work of the caller's own, such as building engines; `failed`: what
    failed in that. A subject that fails, whatever with, is one of the report's `failed`, and the others are measured.
    Raises InputError, and where no subject can be measured the only one's own error, or EngineError with all reasons.
    """
    if not subjects and failed:
        raise nothing_left(failed)
    check_subjects(subjects)
    pixels = (size, size) if isinstance(size, int) else size
    counts = {"steps": steps, "runs": runs, "image_runs": image_runs, "batch": batch}
    numbers = {"guidance_scale": guidance_scale, "seed": seed, "min_seconds": min_seconds}
    texts = check_asked(prompts, pixels, **counts, **numbers)
    homes = {row.label: row.bundle or row.model for row in subjects if row.bundle or not row.replaced}
    pixels = check_models(homes, pixels, steps, scheduler)
    check_baseline(baseline, [subject.label for subject in (*subjects, *(one.subject for one in failed))])
    where, cases, known = device or _default_device(), [Case(subject) for subject in subjects], random_notes(subjects)
    surroundings = environment(where, load_before)  # before the measurement loads the machine
    if isolate:
        prepare_children()
    config = RunConfig(where, fit_together(subjects, where, isolate), isolate, scheduler, pixels, texts)
    loaded = LoadedSubjects(config)
    try:
        if (first := first_opened(cases, loaded)) is None:
            raise nothing_left([*failed, *(case.failed for case in cases if case.failed)])
        height, width = first.size
        wide = None if width == height else width
        request = Request(texts, steps, guidance_scale, seed, height, batch, scheduler, first.copies, wide)
        _make_images(cases, loaded, request, image_runs, within(progress, *SHARES["images"]))
        time_parts(measured(cases, failed), loaded, request, runs, min_seconds, within(progress, *SHARES["steps"]))
        loaded.finish()
        surroundings |= state_after(where)
        kept = measured(cases, failed)
        references = find_references(cases, request, loaded, within(progress, *SHARES["references"]))
    finally:
        loaded.close()
    setup = _setup(request, config, first.scheduler, runs, min_seconds)
    others = [case.subject for case in kept]
    baselines = {case.subject.label: find_baselines(case.subject, others, baseline) for case in kept}
    by_label = {case.subject.label: case for case in kept}
    report = Report(
        setup=setup,
        results=tuple(
            _result(case, by_label, references, baselines[case.subject.label], judge, request) for case in kept
        ),
        environment=surroundings,
        images={case.subject.label: tuple(case.images) for case in kept},
        baselines=baselines,
        command=command,
        notes=(*known, *_notes_of(kept), *notes, *references.notes),
        failed=(*failed, *(case.failed for case in cases if case.failed)),
    )
    return complete(report, where)


def _setup(request: Request, config: RunConfig, scheduler: str, runs: int, min_seconds: float) -> Setup:
    return Setup(
        prompts=request.prompts,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        size_px=request.size_px,
        seed=request.seed,
        unet_batch=request.unet_batch,
        runs=runs,
        min_seconds=min_seconds,
        scheduler=scheduler,
        batch=request.batch,
        timing=Timer(config.device).method,
        open_together=config.keep_loaded,
        confidence=CONFIDENCE,
        isolated=config.isolate,
        width_px=request.width_px,
    )


def _make_images(
    cases: Sequence[Case], loaded: LoadedSubjects, request: Request, runs: int, progress: Progress
) -> None:
    """All images of all subjects, then timed ones; one subject after the other where they do not fit together."""
    groups = [cases] if loaded.config.keep_loaded else [[case] for case in cases]
    for place, group in enumerate(groups):
        part = within(progress, place / len(groups), (place + 1) / len(groups))
        first_images(group, loaded, request, within(part, 0.0, 0.65))
        time_images([case for case in group if not case.failed], loaded, request, runs, within(part, 0.65, 1.0))


def random_notes(subjects: Sequence[Subject]) -> list[str]:
    """A warning for every model of random weights: its speed and size count, its images mean nothing."""
    names = dict.fromkeys(subject.model_label for subject in subjects if has_random_weights(subject))
    return [f"{name} has random weights: its speed and size count, its images mean nothing" for name in names]


def _notes_of(cases: Sequence[Case]) -> list[str]:
    """What models were given beside prompts, and what of prompts was cut."""
    return list(dict.fromkeys(note for case in cases if case.opened for note in case.opened.notes))


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_baseline(baseline: str | None, labels: Sequence[str]) -> None:
    """InputError for a baseline that is no label."""
    if baseline is not None and baseline not in labels:
        raise InputError(f"baseline {baseline!r} is not among the subjects: choose one of {', '.join(labels)}")


def find_baselines(subject: Subject, subjects: Sequence[Subject], baseline: str | None) -> dict[str, str]:
    """What a subject's speed is divided by: `eager` of its model, the `teacher`'s eager, the asked `baseline`.

    Eager in float32 before eager in half; a subject is never its own baseline.
    """
    eager = sorted((other for other in subjects if other.is_eager), key=lambda other: not other.is_reference)
    own = next((other.label for other in eager if other.model_key == subject.model_key), None)
    teacher = next((other.label for other in eager if other.role == TEACHER), None)
    chosen = baseline if baseline in [other.label for other in subjects] else None  # it may have been left out
    found = {"eager": own, "teacher": teacher, "baseline": chosen}
    return {name: label for name, label in found.items() if label not in (None, subject.label)}


def _seconds(samples: Sequence[Sequence[Sample]]) -> list[list[float]]:
    return [[sample.seconds for sample in part] for part in samples]


def _cpu_seconds(samples: Sequence[Sequence[Sample]]) -> list[list[float]]:
    return [[sample.cpu_s for sample in part] for part in samples]


def _ratios(over: Mapping[str, Sequence[Sequence[Sample]]], own: Sequence[Sequence[Sample]]) -> dict[str, Ratio]:
    """The speed-up over each baseline that was measured in enough rounds."""
    found = {name: speedup(_seconds(samples), _seconds(own)) for name, samples in over.items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _result(
    case: Case,
    cases: Mapping[str, Case],
    references: ReferenceImages,
    baselines: Mapping[str, str],
    judge: Judge | None,
    request: Request,
) -> Result:
    subject = case.subject
    own, half, teacher = references.own(subject), references.half(subject), references.teacher(subject)
    against = None if own is None else own.distance(case.images)
    half_against = None if own is None or half is None else own.distance(half.images)
    over = {name: cases[label] for name, label in baselines.items()}
    assert case.opened is not None
    assert case.memory is not None
    return Result(
        subject=subject,
        unet_step_ms=Spread.of(_seconds(case.step_samples), 1000),
        unet_step_cpu_ms=Spread.of(_cpu_seconds(case.step_samples), 1000),
        image_s=Spread.of(_seconds(case.image_samples), 1 / request.batch),
        load_s=case.opened.load_s,
        first_call_s=case.first_call_s,
        unet_parameters=case.opened.unet_parameters,
        parameters=case.opened.parameters,
        bytes_on_disk=size_on_disk(subject),
        rss_growth_bytes=case.memory.growth,
        repeatable=case.repeatable,
        attention=case.attention,
        against_eager=against,
        against_teacher=None if teacher is None else teacher.distance(case.images),
        verdict=judge_engine(subject, against, half_against),
        step_speedup=_ratios({name: other.step_samples for name, other in over.items()}, case.step_samples),
        image_speedup=_ratios({name: other.image_samples for name, other in over.items()}, case.image_samples),
        judged=None if judge is None else dict(judge(case.images, request.image_prompts)),
        image_cpu_s=Spread.of(_cpu_seconds(case.image_samples), 1 / request.batch),
        text_encoder_ms=Spread.of(_seconds(case.parts[TEXT_ENCODER]), 1000),
        vae_decode_ms=Spread.of(_seconds(case.parts[VAE_DECODER]), 1000),
        unet_calls=case.unet_calls,
        images_per_call=request.batch,
        memory=case.memory,
    )
