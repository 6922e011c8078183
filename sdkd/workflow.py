"""From a model and a target to a fresh bundle: the one place that calls both export and engine building."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.bundle.manifest import MANIFEST, Bundle, EngineRecord, FileRecord
from sdkd.bundle.onnx_weights import TRANSFORMS_FILE, replaced, save_whole
from sdkd.core.components import CACHED_UNET
from sdkd.core.console import Progress, quiet, within
from sdkd.core.files import lock, new_folder, write_bytes
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import BundleError
from sdkd.models.fused import Loras, with_loras
from sdkd.models.resolve import Model, resolve
from sdkd.models.source import ModelSource
from sdkd.targets.plan import EnginePlan

if TYPE_CHECKING:
    import numpy as np

SWAPPED = "swapped"  # folder of a bundle: engines of other weights


@dataclass(frozen=True)
class Prepared:
    """A bundle that holds a fresh engine: where, under which slot, and what had to be done."""

    bundle: Path
    slot: str
    exported: bool
    built: bool


def prepare(
    model: Model,
    plan: EnginePlan,
    folder: Path,
    *,
    ranges: ShapeRanges | None = None,
    components: tuple[str, ...] | None = None,
    cached: bool = False,
    loras: Loras = (),
    reuse: Path | None = None,
    progress: Progress = quiet,
) -> Prepared:
    """Export and build only what is missing or stale; `folder` gets one bundle per ONNX precision.

    `loras` are fused into the model, as `export_pipeline` takes them. `cached`: for step caching, too. `reuse`: such a
    folder of another model, whose components are copied where the weights are the same.
    Raises what export and build raise; an existing bundle of another model is made again.
    """
    from export.build.engines import build_engine
    from export.pipeline import export_pipeline
    from export.room import Engines

    source, path, target = with_loras(resolve(model), loras), Path(folder) / plan.onnx, plan.target.name
    components = (*(components or source.family.components), *([CACHED_UNET] if cached else []))
    step = within(progress, 0.0, 0.8)
    stale = not _is_current(path, source, plan, components)
    if stale:
        export_pipeline(
            source,
            path,
            precision=plan.onnx,
            components=components,
            step_caching=cached,
            engines=Engines(plan),
            overwrite=(path / MANIFEST).exists(),
            reuse=() if reuse is None else (Path(reuse) / plan.onnx,),
            progress=step,
        )
    else:
        step(f"{path.name} ONNX is fresh, re-used", 1.0)
    before = Bundle.open(path)
    build_engine(
        path,
        target,
        precision=plan.precision,
        ranges=ranges,
        components=components,
        keep_slower=True,  # whoever prepares engines wants to see them
        progress=within(progress, 0.8, 1.0),
    )
    return Prepared(path, plan.slot, stale, before.manifest.engines != Bundle.open(path).manifest.engines)


def _is_current(path: Path, source: ModelSource, plan: EnginePlan, components: tuple[str, ...]) -> bool:
    """Whether a bundle is what an export would make now, undamaged."""
    from export.pipeline import export_reasons

    try:
        bundle = Bundle.open(path)
        for name in components:
            bundle.verify_files(bundle.component(name))
    except BundleError:
        return False
    return not export_reasons(bundle, source, plan, components)


def rebuild(bundle: Bundle, record: EngineRecord, stored: Mapping[str, np.ndarray]) -> Bundle:
    """Build one engine of a bundle again from other weights; kept in the bundle's folder `swapped`, by content.

    `stored`: weights by name as the graph stores them (`sdkd.bundle.onnx_weights.stored_weights`); the others stay.
    Same target, precision, profiles and options. Returns a bundle with that engine alone, whose ONNX is not kept.
    Raises what `export.build_engine` raises.
    """
    from export.build.engines import build_engine
    from export.build.options import BuildOptions

    home = bundle.path / SWAPPED / content_key(record, stored)
    with lock(home):
        if (home / MANIFEST).is_file():
            found = Bundle.open(home)
            found.verify_files(found.engine(record.slot, record.component))
            return found
        with new_folder(home, overwrite=True) as folder:
            _with_weights(bundle, record, stored, folder)
            options = BuildOptions.of(record.flags.get("options", {}))
            build_engine(
                folder, record.target, precision=record.precision, ranges=list(record.profiles), options=options
            )
            for file in (folder / record.component).glob("model.onnx*"):
                file.unlink()
    return Bundle.open(home)


def content_key(record: EngineRecord, stored: Mapping[str, np.ndarray]) -> str:
    """What a rebuilt engine is known by: what it was built from and for, and the bytes of its other weights."""
    known = {"ranges": [r.to_json() for r in record.profiles], "flags": dict(record.flags)}
    parts = [record.slot, record.component, record.onnx_sha256, json.dumps(known, sort_keys=True, default=str)]
    parts.append(json.dumps(dict(record.environment), sort_keys=True))
    digest = hashlib.sha256("\n".join(parts).encode())
    for name, array in sorted(stored.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:24]


def _with_weights(bundle: Bundle, record: EngineRecord, stored: Mapping[str, np.ndarray], folder: Path) -> None:
    """A bundle of one component with other weights: its graph, and the configs that say what sizes it has."""
    for config in (*bundle.path.glob("*/config.json"), *bundle.path.glob("tokenizer/tokenizer_config.json")):
        write_bytes(folder / config.relative_to(bundle.path), config.read_bytes())
    component = bundle.component(record.component)
    original, graph = bundle.path / component.files[0].path, folder / component.files[0].path
    save_whole(replaced(original, stored), original.parent, graph)
    write_bytes(graph.parent / TRANSFORMS_FILE, (original.parent / TRANSFORMS_FILE).read_bytes())
    files = tuple(FileRecord.of(folder, file) for file in (graph, graph.with_name("model.onnx.data")) if file.is_file())
    changed = dataclasses.replace(component, files=files)
    manifest = dataclasses.replace(bundle.manifest, components={record.component: changed}, engines={})
    Bundle(folder, manifest).with_rest().save()
