"""What a comparison learns once nothing is timed any more: the machine's limits, and scores that need weights."""

from __future__ import annotations

import dataclasses
import functools

from sdkd.compare.limits import Work, element_bytes, fraction, measure_ceilings, unet_work
from sdkd.compare.quality import Perceptual
from sdkd.compare.report import Report, Result, Setup
from sdkd.compare.subjects import Subject
from sdkd.errors import SdkdError


def complete(report: Report, device: str) -> Report:
    """The report with limits reached, CLIP scores where CLIP is on this disk, and the names of what is not."""
    missing = f"LPIPS: {lpips_or_why()}" if isinstance(lpips_or_why(), str) else None
    found = with_clip_scores(with_limits(report, device), device)
    return dataclasses.replace(found, not_measured=(*([missing] if missing else []), *found.not_measured))


def with_limits(report: Report, device: str) -> Report:
    """Every UNet call against a matrix product in its precision and a copy, both measured now on `device`.

    A subject whose model is gone gets no limit, and the report a note.
    """
    precisions = dict.fromkeys(row.subject.precision for row in report.results)
    ceilings = {precision: measure_ceilings(device, precision) for precision in precisions}
    results, notes = list[Result](), list[str]()
    for row in report.results:
        try:
            work = subject_work(row.subject, report.setup)
        except SdkdError as error:
            notes.append(f"{row.subject.label}: its limit is not known ({error})")
            results.append(row)
            continue
        limit = fraction(work, ceilings[row.subject.precision], row.unet_step_ms.median / 1000)
        results.append(dataclasses.replace(row, work=work, limit=limit))
    return dataclasses.replace(report, results=tuple(results), ceilings=ceilings, notes=(*report.notes, *notes))


def subject_work(subject: Subject, setup: Setup) -> Work:
    """The work of one of the subject's timed UNet calls, from its configs alone; ModelError when they are gone."""
    from sdkd.models import latent_scale, unet_config

    home = subject.bundle or subject.model
    side = setup.size_px // latent_scale(home)
    return unet_work(unet_config(home), setup.unet_batch, side, side, element_bytes=element_bytes(subject.precision))


@functools.cache
def lpips_or_why() -> Perceptual | str:
    """LPIPS, loaded once, or why it cannot be measured here."""
    from sdkd.scores import NotMeasuredError, lpips_distance

    try:
        return lpips_distance()
    except NotMeasuredError as error:
        return str(error)


def perceptual() -> Perceptual | None:
    """LPIPS where its weights are on this disk."""
    found = lpips_or_why()
    return None if isinstance(found, str) else found


def with_clip_scores(report: Report, device: str) -> Report:
    """CLIP scores of every image with its prompt; without CLIP's weights the reason in `not_measured`."""
    from sdkd.scores import CLIP_SCORE_MODEL, clip_scores, find_clip, load_clip

    prompts = report.setup.image_prompts
    try:
        model, processor = load_clip(find_clip(None, CLIP_SCORE_MODEL), device)
        scores = [
            tuple(clip_scores(model, processor, report.images[row.subject.label], prompts)) for row in report.results
        ]
    except SdkdError as error:
        return dataclasses.replace(report, not_measured=(*report.not_measured, f"CLIP score: {error}"))
    results = [dataclasses.replace(row, clip_scores=found) for row, found in zip(report.results, scores, strict=True)]
    return dataclasses.replace(report, results=tuple(results))
