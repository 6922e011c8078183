"""A pipeline's components in two processes: the UNet here, the others in a child while its graph is traced.

A trace is Python on one core; the UNet's takes about as long as everything of the other components together. The check
against PyTorch has work for every core and its own peak of memory, so that a second process gains little beside it:
with it, all is done in turn.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.component import ExportOptions, export_component, reusable
from export.source import Source, open_source
from sdkd.bundle.manifest import REPLACEMENTS, ComponentRecord, Manifest
from sdkd.bundle.memory import free_memory
from sdkd.core.child import BackgroundJob
from sdkd.core.components import CACHED_UNET, CONFIG_FOLDERS, TEXT_ENCODERS, UNETS
from sdkd.core.console import Progress, quiet, within
from sdkd.core.contract import torch_dtype
from sdkd.models.fused import LORAS, Loras, recorded_loras
from sdkd.models.ip_adapter import IP_ADAPTERS
from sdkd.models.resolve import Model

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

# Of the time.
SHARES = {
    **dict.fromkeys(TEXT_ENCODERS, 1),
    "unet": 9,
    CACHED_UNET: 1,
    "vae_decoder": 2,
    "vae_encoder": 2,
    "controlnet": 4,
}
CHILD_BYTES = 3e9  # what a child needs at most: libraries, one component in float32, its graph


def source_for(
    model: Model | StableDiffusionPipeline,
    replaced: Mapping[str, str],
    options: ExportOptions,
    digests: Mapping[str, str] | None = None,
    loras: Loras = (),
) -> Source:
    """`open_source` with the dtype that an export needs.

    The comparison needs the float32 weights; without it half of the memory will do.
    """
    dtype = torch.float32 if options.verify else torch_dtype(options.precision)
    source = open_source(model, replaced, dtype, digests, loras)
    source.step_caching, source.ip_adapters = options.step_caching, options.ip_adapters
    if options.ip_adapters:
        source.about[IP_ADAPTERS] = [asdict(adapter) for adapter in options.ip_adapters]
    return source


def export_components(
    source: Source,
    names: Sequence[str],
    options: ExportOptions,
    versions: Mapping[str, str],
    folder: Path,
    progress: Progress,
) -> dict[str, ComponentRecord]:
    """Export components into `folder`; their records in the order of `names`.

    The largest is exported first: its float32 weights are the peak of memory, and the exporter's libraries, which stay
    loaded, are not there yet. But its last layer for step caching is before it, since the UNet is changed in place.
    """
    order = sorted(names, key=SHARES.__getitem__, reverse=True)
    first = [name for name in reversed(UNETS) if name in names] if "unet" in names else order
    rest = [name for name in order if name not in first]
    order = [*first, *rest]
    end = _share(first) / _share(order)
    with contextlib.ExitStack() as stack:
        others: list[BackgroundJob] = []

        def begin() -> None:
            if rest and _worth_a_child(source, rest, options, versions):
                job = BackgroundJob(CHILD, _arguments(source, rest, options, versions, folder))
                others.append(stack.enter_context(job))

        records = _in_turn(source, first, options, versions, folder, within(progress, 0.0, end), begin)
        after = within(progress, end, 1.0)
        if others:
            data = others[0].result(after)
            records |= Manifest.from_json(data).components
        else:
            records |= _in_turn(source, rest, options, versions, folder, after)
    return {name: records[name] for name in names}


def _share(names: Sequence[str]) -> int:
    return sum(SHARES[name] for name in names)


def _in_turn(
    source: Source,
    order: Sequence[str],
    options: ExportOptions,
    versions: Mapping[str, str],
    folder: Path,
    progress: Progress,
    lighter: Callable[[], None] = lambda: None,
) -> dict[str, ComponentRecord]:
    total, done = _share(order), 0
    records: dict[str, ComponentRecord] = {}
    for index, name in enumerate(order):
        step = within(progress, done / total, (done + SHARES[name]) / total, f"{name}: ")
        last = not any(CONFIG_FOLDERS[other] == CONFIG_FOLDERS[name] for other in order[index + 1 :])
        when_light = lighter if name == order[-1] else lambda: None
        records[name] = export_component(source, name, options, versions, folder, last, step, when_light)
        if last:
            source.release(name)
        gc.collect()
        done += SHARES[name]
    return records


# The child

CHILD = "export.side_by_side:export_named"


def _worth_a_child(source: Source, names: Sequence[str], options: ExportOptions, versions: Mapping[str, str]) -> bool:
    """Whether a child can load the model, nothing is checked, a core and memory are free, and there is work to do."""
    return (
        source.model is not None
        and not options.verify
        and torch.get_num_threads() > 1
        and free_memory() > CHILD_BYTES
        and any(reusable(source, name, options, versions) is None for name in names)
    )


def _arguments(
    source: Source, names: Sequence[str], options: ExportOptions, versions: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    return {
        "model": "" if source.model is None else source.model.name,
        "replaced": {part: source.about[part] for part in REPLACEMENTS if part in source.about},
        "digests": dict(source.digests),
        "loras": source.about.get(LORAS, []),
        "names": list(names),
        "options": options.to_json(),
        "versions": dict(versions),
        "folder": str(folder),
    }


def export_named(
    model: str,
    replaced: Mapping[str, str],
    digests: Mapping[str, str],
    loras: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    options: Mapping[str, Any],
    versions: Mapping[str, str],
    folder: str,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """What the child does: export components of a named model in turn; their records as a manifest's JSON."""
    wanted = ExportOptions.from_json(options)
    source = source_for(model, replaced, wanted, digests, recorded_loras({LORAS: loras}))
    records = _in_turn(source, names, wanted, versions, Path(folder), progress)
    return Manifest({}, {}, records).to_json()
