"""`sdkd vae-distill`: a small VAE of TAESD's shape, trained from a model's own."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from typing import Annotated, Any

import typer

from sdkd.core.console import progress, show, show_json, table
from sdkd.core.help_page import LOSSES
from sdkd.distill.data.rows import split_columns
from sdkd.distill.options import INPUTS, REQUIRED, RUN, Options, as_command, setting_option
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.vae.config import SHARED, TAESD, vae_config
from sdkd.distill.vae.losses import DEFAULT
from sdkd.distill.vae.losses import LOSSES as TABLE

_BLOCKS = "Residual blocks at each image size but the largest, which has 1: 3, or 6,6,3."
_WEIGHTS = f"Of the decoder, by weight: {', '.join(TABLE)}."
_SAID = {"batch_size": "Images per step.", "precision": "fp32 or bf16, of both VAEs."}
_OWN: Options = {
    "vae_of": (
        Annotated[str, typer.Option(help="Whose VAE: a diffusers folder, hub id, .safetensors or demo.")],
        REQUIRED,
    ),
    **INPUTS,
    "width": (Annotated[int, typer.Option(help="Channels of every layer.")], 64),
    "blocks": (Annotated[str, typer.Option(help=_BLOCKS)], "3"),
    "losses": (Annotated[str, typer.Option(help=_WEIGHTS, rich_help_panel=LOSSES)], DEFAULT),
    **RUN,
}


def _options() -> Options:
    """Its own, and of a training's settings those that mean something here, with TAESD's defaults."""
    hints, items = typing.get_type_hints(TrainConfig), {item.name: item for item in dataclasses.fields(TrainConfig)}
    settings = {name: setting_option(items[name], hints[name], TAESD.get(name), _SAID.get(name)) for name in SHARED}
    return {**_OWN, **settings}


def _main(values: dict[str, Any]) -> None:
    from sdkd.distill.vae.run import VaeJob, run

    names = ("width", "blocks", "losses", *SHARED)
    config = vae_config(**{name: value for name in names if (value := values[name]) is not None})
    vae_of, output = values["vae_of"], values["output"]
    columns = split_columns(values["caption_columns"] or "")
    job = VaeJob(
        vae_of, values["data"], output, config, values["resume"], values["overwrite"], values["image_column"], columns
    )
    with progress("vae-distill") as report:
        found = run(job, report)
    if values["json"]:
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


vae_distill = as_command(
    "vae-distill",
    """Train a small VAE, encoder and decoder, from a model's own: diffusers' AutoencoderTiny, TAESD's shape.

    The decoder learns what the full VAE decodes from latents of the data, the encoder the way back. One process; a
    run goes on from its checkpoints bit for bit. There is no adversarial loss: details that latents do not hold come
    out smoother than TAESD's.
    """,
    _options(),
    _main,
)
