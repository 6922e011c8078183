"""`sdkd export`: a pipeline to ONNX, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.bundle.manifest import Bundle, ComponentRecord
from sdkd.core.console import progress, show, show_json, table
from sdkd.core.profiles import Range, ShapeRanges, parse_size
from sdkd.errors import InputError
from sdkd.models.generation import FORM, parse_generation

COLUMNS = ("component", "opset", "nodes", "parameters", "MB", "max error", "seconds")


def export(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .safetensors file, `demo` or `random:sd15-tiny`.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle folder to write.")],
    precision: Annotated[str, typer.Option(help="Of weights and activations: fp32, fp16 or bf16.")] = "fp32",
    components: Annotated[list[str] | None, typer.Option(help="unet, text_encoder, ...; default: all.")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE: a folder, hub id, `demo` or `random:taesd`.")] = None,
    controlnet: Annotated[str | None, typer.Option(help="A ControlNet's folder or hub id, exported, too.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA to fuse into the weights; may be repeated.")
    ] = None,
    hidden_states: Annotated[bool, typer.Option("--hidden-states", help="All layers' outputs, for clip_skip.")] = False,
    step_caching: Annotated[bool, typer.Option("--step-caching", help="For `generate --cache-interval`.")] = False,
    t2i_adapter: Annotated[bool, typer.Option("--t2i-adapter", help="UNet inputs for T2I-Adapters.")] = False,
    timesteps: Annotated[bool, typer.Option("--timesteps", help="A timestep for each sample of a batch.")] = False,
    ip_adapter: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="An IP-Adapter, for images as prompts; may be repeated.")
    ] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="Block to compute in float32: vae_decoder.decoder.up_blocks.3, ...")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix all shapes, by --size, --batch and --tokens.")] = False,
    size: Annotated[str | None, typer.Option(help="With --static: pixels, 512 or 512x768 (height x width).")] = None,
    batch: Annotated[int | None, typer.Option(help="With --static: images; the UNet takes twice as many.")] = None,
    tokens: Annotated[int | None, typer.Option(help="With --static: tokens that reach the UNet.")] = None,
    run_with: Annotated[
        str | None, typer.Option(help=f"How it was made to be run, if its files do not say: {FORM}.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="What the graphs are for: older TensorRT parses opset 18.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23; default: the best of each part.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare every graph with PyTorch, look for overflow.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Export a pipeline to ONNX, checked against PyTorch."""
    from export.pipeline import export_pipeline

    names = tuple(name for group in components or () for name in group.split(",") if name)
    with progress(f"export {precision}") as step:
        done = export_pipeline(
            model,
            bundle,
            precision=precision,
            components=names or None,
            opset=opset,
            target=target,
            vae=vae,
            controlnet=controlnet,
            loras=lora or (),
            hidden_states=hidden_states,
            step_caching=step_caching,
            t2i_adapter=t2i_adapter,
            timesteps=timesteps,
            ip_adapters=ip_adapter or (),
            keep_float=tuple(name for group in keep_float or () for name in group.split(",") if name),
            static=static_ranges(static, size, batch, tokens),
            generation=None if run_with is None else parse_generation(run_with),
            verify=verify,
            overwrite=overwrite,
            progress=step,
        )
    if json:
        show_json(summary(done))
        return
    show(table(f"{bundle} ({precision})", COLUMNS, [_row(part) for part in summary(done)["components"]]))
    show(*notes(done))
    needed = [name for name in done.family.components if name != "vae_encoder"]
    lacking = [name for name in needed if name not in done.manifest.components]
    build = f"Build engines with: {done.build_command('onnxruntime')}"
    show(f"Engines need {', '.join(lacking)}, too: export the model again with them." if lacking else build)


def static_ranges(static: bool, size: str | None, batch: int | None, tokens: int | None) -> ShapeRanges | None:
    """The shapes of a static export; None for a dynamic one. InputError for a size without --static, or none with it.

    Tokens default to CLIP's 77.
    """
    given = {"--size": size, "--batch": batch, "--tokens": tokens}
    if not static:
        alone = [name for name, value in given.items() if value is not None]
        if alone:
            raise InputError(f"{alone[0]} {given[alone[0]]} is for a static export: add --static, or leave it out")
        return None
    if size is None:
        raise InputError("--static fixes all shapes and needs the image size: add --size 512")
    height, width = parse_size(size)
    return ShapeRanges(
        Range.fixed(1 if batch is None else batch),
        Range.fixed(height),
        Range.fixed(width),
        Range.fixed(77 if tokens is None else tokens),
    )


def notes(bundle: Bundle) -> list[str]:
    """What the table does not say: of the model, blocks kept in float32, graphs that were not compared."""
    lines = [
        f"{Path(bundle.manifest.source['model']).name}: {note}." for note in bundle.manifest.source.get("notes", ())
    ]
    for name, record in bundle.manifest.components.items():
        kept = record.details.get("islands", {}).get("float32_blocks", {})
        if kept:
            reason = next(iter(kept.values()))
            lines.append(f"{name}: {len(kept)} blocks stay in float32, from {next(iter(kept))} on ({reason}).")
    if any(record.parity is None for record in bundle.manifest.components.values()):
        lines.append("Not compared with PyTorch, as --no-verify asks; the manifest says so.")
    return lines


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
