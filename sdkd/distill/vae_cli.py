"""`sdkd vae-distill`: a small VAE of TAESD's shape, trained from a model's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sdkd.core.console import progress, show, show_json, table
from sdkd.core.help_page import DATA, LOSSES, OPTIMIZER, SPEED, STATES
from sdkd.distill.data.rows import split_columns
from sdkd.distill.vae.config import vae_config
from sdkd.distill.vae.losses import DEFAULT
from sdkd.distill.vae.losses import LOSSES as TABLE


def vae_distill(
    vae_of: Annotated[str, typer.Option(help="Whose VAE: a diffusers folder, hub id, .safetensors or demo.")],
    data: Annotated[str, typer.Option(help="Folder, tar shards, parquet, hub id, latents of `sdkd cache`, or demo.")],
    output: Annotated[Path, typer.Option(help="Folder for the small VAE, which --vae takes.")],
    width: Annotated[int, typer.Option(help="Channels of every layer.")] = 64,
    blocks: Annotated[
        str, typer.Option(help="Residual blocks at each image size but the largest, which has 1: 3, or 6,6,3.")
    ] = "3",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-4,
    resolution: Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or OUTPUT/checkpoint-<step>.")] = "never",
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
    losses: Annotated[
        str, typer.Option(help=f"Of the decoder, by weight: {', '.join(TABLE)}.", rich_help_panel=LOSSES)
    ] = DEFAULT,
    schedule: Annotated[
        str, typer.Option(help="cosine, linear or constant, after the warm-up.", rich_help_panel=OPTIMIZER)
    ] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps of rising learning rate.", rich_help_panel=OPTIMIZER)] = 0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=OPTIMIZER)] = 0.0,
    betas: Annotated[tuple[float, float], typer.Option(help="Of AdamW.", rich_help_panel=OPTIMIZER)] = (0.9, 0.9),
    max_grad_norm: Annotated[
        float, typer.Option(help="Clip the gradient's global norm; 0: off.", rich_help_panel=OPTIMIZER)
    ] = 1.0,
    image_column: Annotated[str | None, typer.Option(help="Column of the images. [default: found]")] = None,
    caption_columns: Annotated[str | None, typer.Option(help="Columns of captions: 'text,caption'.")] = None,
    max_images: Annotated[
        int | None, typer.Option(help="Use the first so many. [default: all]", rich_help_panel=DATA)
    ] = None,
    crop: Annotated[str, typer.Option(help="center or random.", rich_help_panel=DATA)] = "center",
    flip: Annotated[bool, typer.Option(help="Mirror every other image.", rich_help_panel=DATA)] = False,
    latents: Annotated[
        str, typer.Option(help="memory: encode all images first; online: in each step; auto.", rich_help_panel=DATA)
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Threads that read images.", rich_help_panel=SPEED)] = 4,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of both VAEs.", rich_help_panel=SPEED)] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    log_every: Annotated[
        int, typer.Option(help="Steps between records of training.jsonl.", rich_help_panel=STATES)
    ] = 50,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: one at the end.", rich_help_panel=STATES)
    ] = 0,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.", rich_help_panel=STATES)] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train a small VAE, encoder and decoder, from a model's own: diffusers' AutoencoderTiny, TAESD's shape.

    The decoder learns what the full VAE decodes from latents of the data, the encoder the way back. One process; a
    run goes on from its checkpoints bit for bit. There is no adversarial loss: details that latents do not hold come
    out smoother than TAESD's.
    """
    from sdkd.distill.vae.run import VaeJob, run

    config = vae_config(
        width=width, blocks=blocks, losses=losses, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
        schedule=schedule, warmup=warmup, weight_decay=weight_decay, betas=betas, max_grad_norm=max_grad_norm,
        max_images=max_images, resolution=resolution, crop=crop, flip=flip, latents=latents, workers=workers,
        precision=precision, device=device, seed=seed, log_every=log_every, save_every=save_every, keep=keep,
    )  # fmt: skip
    columns = split_columns(caption_columns or "")
    job = VaeJob(vae_of, data, output, config, resume, overwrite, image_column, columns)
    with progress("vae-distill") as report:
        found = run(job, report)
    if json:
        show_json(found)
        return
    first, last = found["first"], found["last"]
    rows = [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in first if name.startswith("loss/")]
    show(table(f"Losses of a small VAE of {vae_of}", ["", f"to step {first['step']}", f"to step {last['step']}"], rows))
    if unreadable := found["unreadable"]:
        show(f"{len(unreadable)} images could not be read and were replaced: {'; '.join(unreadable)}")
    show(
        f"{found['parameters']:,} parameters instead of {found['teacher_parameters']:,}; PSNR to the full VAE's images "
        f"{found['psnr_db']:.1f} dB. Saved {output}. Use it: sdkd export {shlex.quote(vae_of)} artifacts/bundle "
        f"--vae {shlex.quote(str(output))}"
    )
