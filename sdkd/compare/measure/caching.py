"""Which subjects of a comparison are compared with step caching, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sdkd.bundle.manifest import Bundle
from sdkd.compare.measure.subjects import Subject
from sdkd.core.components import CACHED_UNET
from sdkd.core.console import Progress
from sdkd.errors import BundleError, InputError, ModelError
from sdkd.models.generation import Generation
from sdkd.models.resolve import resolve
from sdkd.models.source import ModelSource
from sdkd.models.step_caching import check_cachable, check_cached, check_interval

Wanted = tuple[Subject, Callable[[Progress], Subject] | None]
"""A subject, and what exports and builds what it lacks."""


def with_caching(wanted: Sequence[Wanted], interval: int) -> tuple[list[Wanted], list[str]]:
    """Behind every subject in eager PyTorch or on engines the same with step caching; a note for each it does not suit.

    InputError where it suits none, and for another interval than a whole number from 1, which adds nothing.
    """
    check_interval(interval)
    if interval == 1:
        return list(wanted), []
    found, notes = list[Wanted](), list[str]()
    for subject, build in wanted:
        found.append((subject, build))
        if subject.is_compiled or subject.peer is not None:
            continue
        if why := _why_subject_whole(subject, interval, built=build is None):
            notes.append(f"{subject.label}: no step caching ({why})")
        else:
            found.append((_cached(subject, interval), build and _building(build, interval)))
    if wanted and len(found) == len(wanted):
        raise InputError(
            f"cache interval {interval} suits nothing that is compared: {'; '.join(notes) or 'have eager or engines'}"
        )
    return found, notes


def _cached(subject: Subject, interval: int) -> Subject:
    return replace(subject, label=f"{subject.label} cache {interval}", cache_interval=interval)


def _building(build: Callable[[Progress], Subject], interval: int) -> Callable[[Progress], Subject]:
    return lambda progress: _cached(build(progress), interval)


def _why_subject_whole(subject: Subject, interval: int, *, built: bool) -> str | None:
    if subject.has_engines and built and subject.bundle is not None:
        bundle = Bundle.open(subject.bundle)
        try:
            check_cached(bundle)
            bundle.engine(subject.target, CACHED_UNET)
        except BundleError as error:
            return str(error)
    controlled = any(part == "controlnet" for part, _ in subject.replaced)
    return why_whole(resolve(subject.model), subject.run, interval, controlnet=controlled)


def why_whole(source: ModelSource, run: Generation | None, interval: int, *, controlnet: bool = False) -> str | None:
    """Why a model's steps are not to be cached at this interval, from its configs; None when they can be."""
    try:
        if source.here:
            check_cachable(source.unet_config, source.generation, controlnet=controlnet)
        check_interval(interval, None if run is None else run.steps)
    except (InputError, ModelError, BundleError) as error:
        return str(error)
    return None
