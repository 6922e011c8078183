"""`sdkd convert`: any model as one .safetensors file with the original code's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdkd.core.console import progress, show, show_json
from sdkd.core.interrupts import between_steps
from sdkd.models.fused import Lora, with_loras
from sdkd.models.replacements import with_vae
from sdkd.models.resolve import resolve
from sdkd.models.single_file_writer import write_single_file


def convert(
    model: Annotated[str, typer.Argument(help="A folder, hub id, checkpoint of a run, .safetensors or random:sd15.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    precision: Annotated[str, typer.Option(help="Of the weights: fp16 or fp32.")] = "fp16",
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA to fuse into the weights; may be repeated.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE, as `sdkd export` takes it.")] = None,
    spaced: Annotated[
        bool, typer.Option("--spaced", help="Number blocks in threes: for tiny in stable-diffusion.cpp.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that sdkd wrote.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a model as one .safetensors file with the names of the original code, which other programs open.

    UNet, VAE and text encoders go in; tokenizer and scheduler have no place there. `sdkd` reads the file, too.
    """
    source = with_loras(with_vae(resolve(model), vae), lora or ())
    files = (vae, *(Lora.parse(one).file for one in lora or ()))
    with progress("convert") as step, between_steps() as check:

        def told(part: str, fraction: float | None) -> None:
            check()
            step(part, fraction)

        plan = write_single_file(
            source, output, precision=precision, spaced=spaced, overwrite=overwrite, inputs=files, progress=told
        )
    tensors = sum(len(part.rows) for part in plan.parts)
    if json:
        found = {"model": source.name, "output": str(output), "tensors": tensors, "metadata": dict(plan.metadata)}
        show_json({**found, "notes": [*source.notes, *plan.notes]})
        return
    show(
        f"Saved {output} ({tensors} tensors in {precision}).",
        *(f"Note: {note}." for note in (*source.notes, *plan.notes)),
    )
