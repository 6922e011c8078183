"""`sdkd export`: a pipeline to ONNX, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.bundle import Bundle, ComponentRecord
from sdkd.console import progress, show, show_json, table
from sdkd.contract import BASE_COMPONENTS

COLUMNS = ("component", "opset", "nodes", "parameters", "MB", "max error", "seconds")


def export(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .safetensors file, `demo` or `random:sd15-tiny`.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle folder to write.")],
    precision: Annotated[str, typer.Option(help="Of weights and activations: fp32, fp16 or bf16.")] = "fp32",
    components: Annotated[list[str] | None, typer.Option(help="unet, text_encoder, ...; default: all.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23; default: the best of each part.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare every graph with PyTorch.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Export a pipeline to ONNX, checked against PyTorch."""
    from export.pipeline import export_pipeline

    names = tuple(name for group in components or BASE_COMPONENTS for name in group.split(",") if name)
    options: dict[str, Any] = {"components": names, "opset": opset, "verify": verify, "overwrite": overwrite}
    with progress(f"export {precision}") as step:
        done = export_pipeline(model, bundle, precision=precision, progress=step, **options)
    if json:
        show_json(summary(done))
        return
    show(table(f"{bundle} ({precision})", COLUMNS, [_row(part) for part in summary(done)["components"]]))
    if not verify:
        show("Not compared with PyTorch, as --no-verify asks; the manifest says so.")
    show(f"Build engines with: sdkd build-engine {bundle} --target onnxruntime")


def summary(bundle: Bundle) -> dict[str, Any]:
    """What was exported, ready for JSON; error figures are null where the graph was not compared."""
    return {
        "bundle": str(bundle.path),
        "source": dict(bundle.manifest.source),
        "components": [_part(record) for record in bundle.manifest.components.values()],
    }


def _part(record: ComponentRecord) -> dict[str, Any]:
    parity = record.parity or {}
    return {
        "component": record.name,
        "precision": record.precision,
        "opset": record.opset,
        "nodes": record.details["nodes"],
        "parameters": record.parameters,
        "bytes": record.total_bytes,
        "max_abs_error": parity.get("max_abs"),
        "relative_error": parity.get("relative"),
        "seconds": record.seconds,
    }


def _row(part: dict[str, Any]) -> list[str]:
    return [
        part["component"],
        str(part["opset"]),
        f"{part['nodes']:,}",
        f"{part['parameters']:,}",
        f"{part['bytes'] / 1e6:,.1f}",
        "-" if part["max_abs_error"] is None else f"{part['max_abs_error']:.1e}",
        f"{part['seconds']:.1f}",
    ]
