"""What a comparison learns once nothing is timed any more: the machine's limits, and scores that need weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from sdkd.compare.measure.limits import Ceilings, Work, element_bytes, fraction, measure_ceilings, unet_work
from sdkd.compare.measure.quality import Perceptual
from sdkd.compare.measure.results import Report, Result, Setup
from sdkd.compare.measure.subjects import Subject
from sdkd.errors import SdkdError


def complete(report: Report, device: str) -> Report:
    """The report with limits reached, CLIP scores where CLIP is on this disk, and the names of what is not."""
    lpips = lpips_or_why()
    missing = (_named("LPIPS", lpips),) if isinstance(lpips, str) else ()
    report = dataclasses.replace(report, not_measured=(*report.not_measured, *missing))
    return with_clip_scores(with_limits(report, device), device)


def with_limits(report: Report, device: str) -> Report:
    """Every UNet call against a matrix product in its precision and a copy, both measured now on `device`.

    Where a ceiling cannot be measured or a model is gone, there is no limit, and the report gets a note: what was
    timed before is not lost for it.
    """
    ceilings, results, notes = dict[str, Ceilings](), list[Result](), list[str]()
    for precision in dict.fromkeys(row.subject.precision for row in report.results):
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
    if (found := ceilings.get(row.subject.precision)) is None:
        return row
    work = subject_work(row.subject, setup)
    return dataclasses.replace(row, work=work, limit=fraction(work, found, row.unet_step_ms.median / 1000))


def subject_work(subject: Subject, setup: Setup) -> Work:
    """The work of one of the subject's timed UNet calls, from its configs alone; ModelError when they are gone."""
    from sdkd.models.resolve import resolve

    home = resolve(subject.bundle or subject.model)
    height, width = (pixels // home.latent_scale for pixels in setup.size)
    return unet_work(home.unet_config, setup.unet_batch, height, width, element_bytes=element_bytes(subject.precision))


@functools.cache
def lpips_or_why() -> Perceptual | str:
    """LPIPS, loaded once, or why it cannot be measured here."""
    from sdkd.compare.measure.scores import lpips_distance

    try:
        return lpips_distance()
    except SdkdError as error:
        return str(error)


def _named(score: str, reason: str) -> str:
    return reason if reason.startswith(score) else f"{score}: {reason}"


def perceptual() -> Perceptual | None:
    """LPIPS where its weights are on this disk."""
    found = lpips_or_why()
    return None if isinstance(found, str) else found


def with_clip_scores(report: Report, device: str) -> Report:
    """CLIP scores of every image with its prompt; without CLIP's weights the reason in `not_measured`."""
    from sdkd.compare.measure.scores import CLIP_SCORE_MODEL, clip_scores, find_clip, load_clip

    prompts = report.setup.image_prompts
    try:
        model, processor = load_clip(find_clip(None, CLIP_SCORE_MODEL), device)
        scores = [
            tuple(clip_scores(model, processor, report.images[row.subject.label], prompts)) for row in report.results
        ]
    except SdkdError as error:
        return dataclasses.replace(report, not_measured=(*report.not_measured, _named("CLIP score", str(error))))
    results = [dataclasses.replace(row, clip_scores=found) for row, found in zip(report.results, scores, strict=True)]
    return dataclasses.replace(report, results=tuple(results))
