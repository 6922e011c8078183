"""`compare`: open the subjects, make the same images with each, time them in interleaved rounds, judge the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sdkd.compare.measure.calls import Asked, Size
from sdkd.compare.measure.cases import (
    Calls,
    Case,
    LoadedSubjects,
    first_images,
    first_opened,
    fit_together,
    measured,
    nothing_left,
    time_cases,
)
from sdkd.compare.measure.environment import environment, state_after
from sdkd.compare.measure.limits import Ceilings, Work, element_bytes, fraction, measure_ceilings, unet_work
from sdkd.compare.measure.outcome import Judge, all_baselines, climb, result_of, unlike_calls
from sdkd.compare.measure.references import find_references
from sdkd.compare.measure.refusals import check_asked, check_models
from sdkd.compare.measure.results import Report, Result, Setup
from sdkd.compare.measure.runner import PRELOAD, RunConfig
from sdkd.compare.measure.stats import CONFIDENCE
from sdkd.compare.measure.subjects import Failed, Subject, check_subjects, has_random_weights
from sdkd.compare.measure.timing import Timer
from sdkd.core import processes
from sdkd.core.console import Progress, quiet, within
from sdkd.core.contract import QUANTIZED
from sdkd.errors import InputError, SdkdError
from sdkd.models.generation import USUAL, Generation
from sdkd.models.resolve import resolve

RUNS = 30
MIN_SECONDS = 1.0
IMAGE_RUNS = 3
SHARES = {"images": (0.0, 0.4), "timing": (0.4, 0.9), "references": (0.9, 1.0)}  # of the time, about


def compare(
    subjects: Sequence[Subject],
    *,
    prompts: Sequence[str],
    steps: int = USUAL.steps,
    guidance_scale: float = USUAL.guidance_scale,
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
    staircase: Sequence[str] = (),
    progress: Progress = quiet,
) -> Report:
    """Measure subjects side by side: speed, size, and how far each one's images are from eager PyTorch's.

    `size`: image side, or height and width, in pixels (default: the first model's own). `runs`: UNet calls timed per
    subject, at least; `image_runs`: whole calls timed. `baseline`: label of one more subject to give ratios to.
    `batch`: images per call. `steps`, `guidance_scale` and `scheduler` (as `sdkd generate` takes it, default: each
    model's own): of the subjects without a `run` of their own.
    `judge` reads the images (caption accuracy). Image n starts from `seed + n`. `isolate`: every subject in a fresh
    process of its own, which measures the memory of each and survives their crashes; a script that asks for it needs
    `if __name__ == "__main__":`.
    `load_before`: the machine's load average before work of the caller's own, such as building engines; `failed`: what
    failed in that. `staircase`: labels of subjects of which each adds one change to the one before; the report then
    says what each brings.
    A subject that fails, whatever with, is one of the report's `failed`, and the others are measured.
    Raises InputError, and where no subject can be measured the only one's own error, or EngineError with all reasons.
    """
    if not subjects and failed:
        raise nothing_left(failed)
    check_subjects(subjects)
    usual = Generation(steps, guidance_scale).with_asked(None, None, scheduler)
    subjects = [dataclasses.replace(subject, run=subject.run or usual) for subject in subjects]
    numbers = {"runs": runs, "image_runs": image_runs, "batch": batch, "seed": seed, "min_seconds": min_seconds}
    texts, pixels = _check(subjects, prompts, (size, size) if isinstance(size, int) else size, numbers)
    labels = [subject.label for subject in (*subjects, *(one.subject for one in failed))]
    check_baseline(baseline, labels)
    check_staircase(staircase, labels)
    where, cases, known = device or _default_device(), [Case(subject) for subject in subjects], random_notes(subjects)
    surroundings = environment(where, load_before)  # before the measurement loads the machine
    if isolate:
        processes.prepare(PRELOAD)
    loaded = LoadedSubjects(RunConfig(where, fit_together(subjects, where, isolate), isolate, pixels, texts, batch))
    try:
        height, width = first_opened(cases, loaded, failed).size
        asked = Asked(texts, seed, height, batch, None if width == height else width)
        first_images(cases, loaded, asked, within(progress, *SHARES["images"]))
        calls = Calls(image_runs, runs, min_seconds)
        time_cases(measured(cases, failed), loaded, asked, calls, within(progress, *SHARES["timing"]))
        loaded.finish()
        surroundings |= state_after(where)
        kept = {case.subject.label: case for case in measured(cases, failed)}
        references = find_references(cases, asked, loaded, within(progress, *SHARES["references"]))
    finally:
        loaded.close()
    setup = Setup(
        **vars(asked), runs=runs, min_seconds=min_seconds, timing=Timer(where).method,
        open_together=loaded.config.keep_loaded, confidence=CONFIDENCE, isolated=isolate, staircase=tuple(staircase),
    )  # fmt: skip
    baselines = all_baselines(kept, baseline)
    results = [result_of(case, kept, references, baselines[name], judge, asked) for name, case in kept.items()]
    report = Report(
        setup=setup,
        results=tuple(results),
        environment=surroundings,
        images={label: tuple(case.images) for label, case in kept.items()},
        baselines=baselines,
        command=command,
        notes=(*known, *_told(kept), *unlike_calls(kept, baselines, asked), *notes, *references.notes),
        failed=(*failed, *(case.failed for case in cases if case.failed)),
        stairs=climb(staircase, kept, results),
    )
    return with_scores(with_limits(report, where), where)


def _told(cases: Mapping[str, Case]) -> list[str]:
    """Each once, what subjects said when they were opened: inputs beside prompts, prompts that are cut."""
    return list(dict.fromkeys(note for case in cases.values() if case.opened for note in case.opened.notes))


def _check(
    subjects: Sequence[Subject], prompts: Sequence[str], size: Size | None, numbers: Mapping[str, float]
) -> tuple[tuple[str, ...], Size | None]:
    """The prompts, and the size of all where it is known; InputError for what cannot be asked of the subjects."""
    texts = check_asked(prompts, size, **numbers)
    known = [subject for subject in subjects if subject.bundle or not subject.replaced]
    homes = {
        row.label: (row.bundle or row.model, row.run, (row.peer,) if row.peer else ())
        for row in known
        if row.run is not None
    }
    return texts, check_models(homes, size)


def random_notes(subjects: Sequence[Subject]) -> list[str]:
    """A warning for every model of random weights: its speed and size count, its images mean nothing."""
    names = dict.fromkeys(subject.model_label for subject in subjects if has_random_weights(subject))
    return [f"{name} has random weights: its speed and size count, its images mean nothing" for name in names]


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_baseline(baseline: str | None, labels: Sequence[str]) -> None:
    """InputError for a baseline that is no label."""
    if baseline is not None and baseline not in labels:
        raise InputError(f"baseline {baseline!r} is not among the subjects: choose one of {', '.join(labels)}")


def check_staircase(staircase: Sequence[str], labels: Sequence[str]) -> None:
    """InputError for a staircase with something else than subjects, or one of them twice."""
    for label in staircase:
        if label not in labels:
            raise InputError(f"{label!r} of the staircase is not among the subjects: choose of {', '.join(labels)}")
        if list(staircase).count(label) > 1:
            raise InputError(f"{label!r} is twice in the staircase: each of its subjects adds one change")


def with_limits(report: Report, device: str) -> Report:
    """Every UNet call against a matrix product in its precision and a copy, both measured now on `device`.

    Where a ceiling cannot be measured or a model is gone, there is no limit, and the report gets a note: what was
    timed before is not lost for it.
    """
    ceilings, results, notes = dict[str, Ceilings](), list[Result](), list[str]()
    for precision in dict.fromkeys(row.subject.precision for row in report.results):
        if precision in QUANTIZED:
            notes.append(
                f"{precision}: the machine's limit is not known, since PyTorch has no product to measure it by"
            )
            continue
        try:
            ceilings[precision] = measure_ceilings(device, precision)
        except RuntimeError as error:  # PyTorch's: no memory left, or no such product on this device
            notes.append(f"{precision}: the machine's limit could not be measured ({str(error).splitlines()[0]})")
    for row in report.results:
        try:
            results.append(_with_limit(row, report.setup, ceilings))
        except SdkdError as error:
            notes.append(f"{row.subject.label}: its limit is not known ({error})")
            results.append(row)
    return dataclasses.replace(report, results=tuple(results), ceilings=ceilings, notes=(*report.notes, *notes))


def _with_limit(row: Result, setup: Setup, ceilings: Mapping[str, Ceilings]) -> Result:
    if (found := ceilings.get(row.subject.precision)) is None or row.subject.caches:  # no call is like another
        return row
    work = subject_work(row.subject, setup, row.unet_batch)
    return dataclasses.replace(row, work=work, limit=fraction(work, found, row.unet_step_ms.median / 1000))


def subject_work(subject: Subject, setup: Setup, latents: int) -> Work:
    """The work of a UNet call of so many latents, from the subject's configs alone; ModelError when they are gone."""
    home = resolve(subject.bundle or subject.model)
    height, width = (pixels // home.latent_scale for pixels in setup.size)
    return unet_work(home.unet_config, latents, height, width, element_bytes=element_bytes(subject.precision))


def with_scores(report: Report, device: str) -> Report:
    """CLIP scores of every image with its prompt where CLIP is on this disk; what is not, in `not_measured`."""
    from sdkd.compare.measure.scores import CLIP_SCORE_MODEL, clip_scores, find_clip, load_clip, lpips_or_why

    missing = {"LPIPS": why} if isinstance(why := lpips_or_why(), str) else {}
    results, prompts = report.results, report.setup.image_prompts
    try:
        clip = load_clip(find_clip(None, CLIP_SCORE_MODEL), device)
        scores = [tuple(clip_scores(*clip, report.images[row.subject.label], prompts)) for row in results]
        results = tuple(dataclasses.replace(row, clip_scores=found) for row, found in zip(results, scores, strict=True))
    except (SdkdError, RuntimeError) as error:  # PyTorch's: no memory left, and the measurement must not be lost
        missing["CLIP score"] = str(error).splitlines()[0]
    said = (why if why.startswith(score) else f"{score}: {why}" for score, why in missing.items())
    return dataclasses.replace(report, results=results, not_measured=(*report.not_measured, *said))
