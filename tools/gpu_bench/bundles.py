"""Bundles and engines that the pieces of a report share, in its work folder: made by the product, once."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_bench.settings import TENSORRT, Settings
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError

if TYPE_CHECKING:
    from export.build.options import BuildOptions
    from gpu_bench.bench import Bench
    from sdkd.targets.gpu_trial import Trial

REST = ("text_encoder", "vae_decoder")
COMPONENTS = (*REST, "unet")
GUIDANCE = 2  # latents per image
TOKENS = Range.fixed(77)


def exported(bench: Bench) -> Bundle:
    """The model's bundle; exported where it is missing, without the comparison, which the report does on the device."""
    settings, home = bench.settings, Path(bench.settings.work)
    folder = home / f"{bench.model}-{settings.precision}"
    with contextlib.suppress(BundleError):
        bundle = Bundle.open(folder)
        for name in COMPONENTS:
            bundle.component(name)
        return bundle
    from export import export_pipeline

    others = [home / f"{other}-{settings.precision}" for other in settings.models if other != bench.model]
    start = time.perf_counter()
    bundle = export_pipeline(
        bench.name, folder, precision=settings.precision, components=COMPONENTS, verify=False, overwrite=True,
        reuse=others,
    )  # fmt: skip
    records = bundle.manifest.components
    bench.record.fact(
        export_s=time.perf_counter() - start,
        exported={name: {"seconds": one.seconds, "bytes": one.total_bytes} for name, one in records.items()},
    )
    return bundle


def profiles(settings: Settings, component: str) -> tuple[ShapeRanges, ...]:
    """Of the UNet one for the smallest batch and size alone, and one for all of them, best at the largest batch.

    Text encoder and VAE are built for one image of any of the sizes.
    """
    first = Range.fixed(settings.sizes[0])
    every = Range(settings.sizes[0], settings.sizes[0], max(settings.sizes))
    if component != "unet":
        return (ShapeRanges(Range.fixed(1), every, every, TOKENS),)
    images = [max(1, batch // GUIDANCE) for batch in settings.batches]
    alone = ShapeRanges(Range.fixed(images[0]), first, first, TOKENS)
    return alone, ShapeRanges(Range(images[0], max(images), max(images)), every, every, TOKENS)


def built(bench: Bench, bundle: Bundle, target: str, *components: str, **options: Any) -> Bundle:
    """The bundle with these engines of a target, in the precision of the report; `options` as of BuildOptions.

    What building took and gave is recorded by target and component.
    """
    from export import build_engine

    settings, how = bench.settings, build_options(bench.settings, target, **options)
    for some in (("unet",), REST):
        if wanted := [name for name in some if name in components]:
            bundle = build_engine(
                bundle, target, precision=settings.precision, ranges=profiles(settings, wanted[0]), components=wanted,
                options=how,
            )  # fmt: skip
    made = {f"{target}/{name}": bundle.engine(target, name) for name in components}
    new = {name: {"builder_s": one.seconds, "engine_bytes": one.total_bytes} for name, one in made.items()}
    bench.record.fact(builds={**bench.record.facts.get("builds", {}), **new})
    return bundle


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


def each_target(bench: Bench) -> Iterator[tuple[str, Bundle]]:
    """The targets of the report that build here and run on its device, with the model's bundle: each a part."""
    from engines.sessions.opening import expected_device
    from sdkd.targets.registry import availability

    found = {target: availability(target) for target in bench.settings.targets}
    targets = [
        target
        for target, here in found.items()
        if here.can_build and here.can_run and expected_device(target).type == bench.device
        if not refused(bench.settings, target)
    ]
    bundle = None
    with bench.record.part("export"):
        bundle = exported(bench) if targets else None
    yield from ((target, bundle) for target in targets if bundle)


def graphs_of(target: str) -> dict[str, bool]:
    """Whether each way to run a target's engine has CUDA graphs; without them only TensorRT's are asked, too."""
    if target.startswith("tensorrt"):
        return {f"{target}, CUDA graphs": True, f"{target}, no graphs": False}
    return {target: True}


@contextlib.contextmanager
def opened(bench: Bench, bundle: Bundle, target: str, part: str, **options: Any) -> Iterator[Any]:
    """A module of a pipeline on an engine, closed afterwards; `bench.load_s` says what opening took.

    `options` as of open_session. EngineError where it is not on the report's device.
    """
    import torch

    from engines.pipelines.pipeline import build_module
    from engines.sessions.opening import open_session

    bench.begin()
    start, session = time.perf_counter(), partial(open_session, bundle, target, **options)
    module: Any = build_module(bundle, target, part, bench.dtype, torch.device(bench.device), None, session)
    bench.load_s = time.perf_counter() - start
    try:
        bench.check_place(module.sessions())
        yield module
    finally:
        module.close()
        bench.wait()


def copy_of(bundle: Bundle, name: str) -> Bundle:
    """A bundle beside another one, with its graphs and without its engines; the one that is there, if any."""
    folder = bundle.path.with_name(f"{bundle.path.name}-{name}")
    if not (folder / "bundle.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("engines", "swapped", "bundle.json"))
        Bundle(folder, replace(bundle.manifest, engines={})).save()
    return Bundle.open(folder)
