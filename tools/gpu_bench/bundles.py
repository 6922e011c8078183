"""Bundles and engines that the pieces of a report share, in its work folder: made by the product, once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_bench.device import Device
from gpu_bench.record import Record
from gpu_bench.settings import TENSORRT, Settings
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, EngineError

if TYPE_CHECKING:
    from export.build.options import BuildOptions
    from sdkd.targets.gpu_trial import Trial

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
    settings: Settings, bundle: Bundle, target: str, components: Sequence[str], profiles: Any, **options: Any
) -> Bundle:
    """The bundle with these engines of a target, in the precision of the report; `options` as of BuildOptions."""
    from export import build_engine

    several = profiles if isinstance(profiles, tuple) else (profiles,)
    return build_engine(
        bundle, target, precision=settings.precision, ranges=several, components=components,
        options=build_options(settings, target, **options),
    )  # fmt: skip


def build_facts(record: Record, bundle: Bundle, target: str, components: Sequence[str]) -> None:
    """Record what building took and gave, by target and component."""
    made = {f"{target}/{name}": bundle.engine(target, name) for name in components}
    new = {name: {"builder_s": one.seconds, "engine_bytes": one.total_bytes} for name, one in made.items()}
    record.fact(builds={**record.facts.get("builds", {}), **new})


def build_options(settings: Settings, target: str, **options: Any) -> BuildOptions:
    """How engines of a target are built here: for this GPU alone where no other plan ran, or can be refitted."""
    from export.build.options import CURRENT, BuildOptions
    from sdkd.targets.gpu_trial import PORTABLE
    from sdkd.targets.registry import TARGETS

    found = trials(settings, target)  # what they showed is part of what an engine records, too
    portable = any(trial.ran and trial.plan == PORTABLE for trial in found)
    alone = "refit" in options or (any(trial.ran for trial in found) and not portable)
    if alone and target in TENSORRT and not TARGETS[target].builds_on_gpu:
        options = {"compute_capabilities": (CURRENT,), **options}
    return BuildOptions(**options)


def trials(settings: Settings, target: str) -> Sequence[Trial]:
    """What plans of a TensorRT kind did on this GPU, tried before or now; empty for others, and for a dry run."""
    if settings.device != "cuda" or target not in TENSORRT:
        return ()
    from sdkd.commands.doctor import try_target
    from sdkd.targets.gpu_trial import remembered

    return remembered(target) or try_target(target)


def refused(settings: Settings, target: str) -> str:
    """Why no plan of a TensorRT kind runs on this GPU; empty where one does."""
    found = trials(settings, target)
    return "" if any(trial.ran for trial in found) else "; ".join(trial.words() for trial in found)


def check_place(sessions: Iterable[Any], device: Device) -> None:
    """EngineError unless all of these sessions run on the report's device: a library may fall back without a word."""
    for session in sessions:
        if session.device.type != device.name:
            raise EngineError(
                f"{session.checked.label} runs on {session.device.type}, and the report is of {device.name}: "
                f"see what `sdkd doctor` says of {session.slot}"
            )


def runnable(settings: Settings) -> list[str]:
    """The targets of the report that build here and run on its device."""
    from engines.sessions.opening import expected_device
    from sdkd.targets.registry import availability

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
