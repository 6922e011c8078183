"""From a model and a target to a fresh bundle: the one place that calls both export and engine building."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdkd.bundle import MANIFEST, Bundle
from sdkd.console import Progress, quiet, within
from sdkd.contract import BASE_COMPONENTS, Precision, ShapeRanges, check_precision
from sdkd.errors import BundleError
from sdkd.targets import check_target, slot_name, slot_precision

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
    exported = _export_if_needed(model, path, onnx, components, like, within(progress, 0.0, 0.8))
    before = _engines(path)
    from export.build import build_engine

    options = {"precision": wanted, "ranges": ranges, "components": components}
    build_engine(path, plain, progress=within(progress, 0.8, 1.0), **options)  # type: ignore[arg-type]
    return Prepared(path, slot_name(plain, wanted, onnx), exported, before != _engines(path))


def _engines(path: Path) -> dict[str, object]:
    return dict(Bundle.open(path).manifest.engines)


def _export_if_needed(
    model: str | Path,
    path: Path,
    precision: Precision,
    components: tuple[str, ...],
    reuse: tuple[Path, ...],
    progress: Progress,
) -> bool:
    from sdkd.models import source_digests

    if _is_current(path, source_digests(model), components):
        progress(f"{path.name} ONNX is fresh, re-used", 1.0)
        return False
    from export.pipeline import export_pipeline

    export_pipeline(
        model,
        path,
        precision=precision,
        components=components,
        overwrite=(path / MANIFEST).exists(),
        reuse=reuse,
        progress=progress,
    )
    return True


def _is_current(path: Path, digests: dict[str, str], components: tuple[str, ...]) -> bool:
    """Whether a bundle holds these components, of these weights, undamaged."""
    try:
        bundle = Bundle.open(path)
        for name in components:
            record = bundle.component(name)
            bundle.verify_files(record)
            if digests.get(name) != record.source_sha256:
                return False
    except BundleError:
        return False
    return True
