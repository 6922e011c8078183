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
from sdkd.core.console import Progress, quiet, within
from sdkd.core.contract import BASE_COMPONENTS, Precision, check_precision
from sdkd.core.files import lock, new_folder, write_bytes
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import BundleError
from sdkd.targets.registry import check_target, slot_name, slot_precision

if TYPE_CHECKING:
    import numpy as np

SWAPPED = "swapped"  # folder of a bundle: engines of other weights

# What the ONNX must be exported in, for an engine of some precision: OpenVINO lowers fp32 by itself.
_HINTED = {"openvino"}


@dataclass(frozen=True)
class Prepared:
    """A bundle that holds a fresh engine: where, under which slot, and what had to be done."""

    bundle: Path
    slot: str
    exported: bool
    built: bool


def onnx_precision(target: str, precision: str) -> Precision:
    """Precision of the ONNX graph from which a target builds an engine of `precision`."""
    return "fp32" if check_target(target).name in _HINTED else check_precision(precision)


def prepare(
    model: str | Path,
    target: str,
    folder: Path,
    *,
    precision: str | None = None,
    ranges: ShapeRanges | None = None,
    components: tuple[str, ...] = BASE_COMPONENTS,
    reuse: Path | None = None,
    progress: Progress = quiet,
) -> Prepared:
    """Export and build only what is missing or stale; `folder` gets one bundle per ONNX precision.

    `reuse`: such a folder of another model, whose components are copied where the weights are the same.
    Raises what export and build raise; an existing bundle of another model is made again.
    """
    wanted = precision or slot_precision(target) or check_target(target).precision
    plain = check_target(target).name
    onnx = onnx_precision(plain, wanted)
    path = Path(folder) / onnx
    like = () if reuse is None else (Path(reuse) / onnx,)
    exported = _export_if_needed(model, path, onnx, plain, components, like, within(progress, 0.0, 0.8))
    before = _engines(path)
    from export.build.engines import build_engine

    options = {"precision": wanted, "ranges": ranges, "components": components}
    build_engine(path, plain, progress=within(progress, 0.8, 1.0), **options)  # type: ignore[arg-type]
    return Prepared(path, slot_name(plain, wanted, onnx), exported, before != _engines(path))


def _engines(path: Path) -> dict[str, object]:
    return dict(Bundle.open(path).manifest.engines)


def _export_if_needed(
    model: str | Path,
    path: Path,
    precision: Precision,
    target: str,
    components: tuple[str, ...],
    reuse: tuple[Path, ...],
    progress: Progress,
) -> bool:
    from sdkd.models.resolve import source_digests

    if _is_current(path, source_digests(model), components, target):
        progress(f"{path.name} ONNX is fresh, re-used", 1.0)
        return False
    from export.pipeline import export_pipeline

    export_pipeline(
        model,
        path,
        precision=precision,
        components=components,
        target=target,
        overwrite=(path / MANIFEST).exists(),
        reuse=reuse,
        progress=progress,
    )
    return True


def _is_current(path: Path, digests: dict[str, str], components: tuple[str, ...], target: str) -> bool:
    """Whether a bundle holds these components, of these weights, undamaged, in opsets that the target parses."""
    from export.graph.to_onnx import choose_opset

    try:
        bundle = Bundle.open(path)
        for name in components:
            record = bundle.component(name)
            bundle.verify_files(record)
            if digests.get(name) != record.source_sha256 or record.opset > choose_opset(name, target=target):
                return False
    except BundleError:
        return False
    return True


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
