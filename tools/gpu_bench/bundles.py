"""Bundles and engines that the pieces of a report share, in its work folder: made by the product, once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_bench.record import Record
from gpu_bench.settings import TENSORRT, Settings
from sdkd.bundle import Bundle
from sdkd.errors import BundleError
from sdkd.profiles import Range, ShapeRanges

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
GUIDANCE = 2  # latents per image


def exported(settings: Settings, model: str, record: Record) -> Bundle:
    """A model's bundle; exported where it is not there, without the comparison, which the report does on the device."""
    home = Path(settings.work)
    folder = home / f"{model}-{settings.precision}"
    try:
        bundle = Bundle.open(folder)
        for name in COMPONENTS:
            bundle.component(name)
        return bundle
    except BundleError:
        pass
    from export import export_pipeline

    others = [home / f"{other}-{settings.precision}" for other in settings.models if other != model]
    start = time.perf_counter()
    bundle = export_pipeline(
        settings.models[model], folder, precision=settings.precision, components=COMPONENTS, verify=False,
        overwrite=True, reuse=others,
    )  # fmt: skip
    records = bundle.manifest.components
    record.fact(
        export_s=time.perf_counter() - start,
        exported={name: {"seconds": one.seconds, "bytes": one.total_bytes} for name, one in records.items()},
    )
    return bundle


def unet_profiles(settings: Settings) -> tuple[ShapeRanges, ...]:
    """One profile for the smallest batch and size alone, and one for all of them, best at the largest batch."""
    images = [max(1, batch // GUIDANCE) for batch in settings.batches]
    first, most = Range.fixed(settings.sizes[0]), max(settings.sizes)
    every = Range(settings.sizes[0], settings.sizes[0], most)
    tokens = Range.fixed(77)
    alone = ShapeRanges(Range.fixed(images[0]), first, first, tokens)
    return alone, ShapeRanges(Range(images[0], max(images), max(images)), every, every, tokens)


def rest_profile(settings: Settings) -> ShapeRanges:
    """What text encoder and VAE are built for: one image of any of the sizes."""
    sizes = Range(settings.sizes[0], settings.sizes[0], max(settings.sizes))
    return ShapeRanges(Range.fixed(1), sizes, sizes, Range.fixed(77))


def built(
    settings: Settings, bundle: Bundle, target: str, components: Sequence[str], profiles: Any, options: Any = None
) -> Bundle:
    """The bundle with these engines of a target, in the precision of the report."""
    from export import build_engine
    from export.build_options import BuildOptions

    refused(settings, target)  # what a trial showed is part of what an engine records
    several = profiles if isinstance(profiles, tuple) else (profiles,)
    return build_engine(
        bundle, target, precision=settings.precision, ranges=several, components=components,
        options=options or BuildOptions(),
    )  # fmt: skip


def refused(settings: Settings, target: str) -> str:
    """Why a TensorRT kind does not run on this GPU, by a trial made before or now; empty where it does."""
    if settings.device != "cuda" or target not in TENSORRT:
        return ""
    from sdkd.doctor import try_target
    from sdkd.gpu_trial import PORTABLE, remembered

    trials = remembered(target) or try_target(target)
    ran = any(trial.ran and trial.plan == PORTABLE for trial in trials)
    return "" if ran else "; ".join(trial.words() for trial in trials)


def runnable(settings: Settings) -> list[str]:
    """The targets of the report that build here and run on its device."""
    from engines.session import expected_device
    from sdkd.targets import availability

    found = {target: availability(target) for target in settings.targets}
    return [
        target
        for target, here in found.items()
        if here.can_build and here.can_run and expected_device(target).type == settings.device
        if not refused(settings, target)
    ]


def copy_of(bundle: Bundle, name: str) -> Bundle:
    """A bundle beside another one, with its graphs and without its engines; the one that is there, if any."""
    folder = bundle.path.with_name(f"{bundle.path.name}-{name}")
    if not (folder / "bundle.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("engines", "swapped", "bundle.json"))
        from dataclasses import replace

        Bundle(folder, replace(bundle.manifest, engines={})).save()
    return Bundle.open(folder)
