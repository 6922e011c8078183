"""Layers of a UNet in the original code's names, which kohya's LoRAs of SDXL have, as diffusers names them."""

from __future__ import annotations

import re

_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_RESNET = {
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_EDGES = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
_NAME = re.compile(r"(?:(input|output)_blocks_(\d+)|middle_block)_([012])_(.+)")


def diffusers_name(module: str) -> str | None:
    """The diffusers name of a UNet's layer, both with underscores for dots; None for what the original code has not.

    Of Stable Diffusion 1.x and 2.x and of SDXL, whose blocks have two layers: an input block is a layer or a
    downsampler, an output block a layer with the upsampler behind it. Source: ldm's and sgm's openaimodel.py.
    """
    if module in _EDGES:
        return _EDGES[module]
    match = _NAME.fullmatch(module)
    if match is None:
        return None
    side, number, place, rest = match.groups()
    if side is None:
        return _layer(f"mid_block_{_MIDDLE[int(place)]}", rest)
    block, layer = divmod(int(number) - (side == "input"), 3)
    blocks = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):
        return f"{blocks}_{'down' if rest == 'op' else 'up'}samplers_0_conv"
    return _layer(f"{blocks}_{'resnets' if place == '0' else 'attentions'}_{layer}", rest)


def _layer(module: str, rest: str) -> str | None:
    """A layer inside a resnet, whose parts have other names, or inside an attention, whose parts have the same."""
    rest = _RESNET.get(rest, "") if "resnets" in module else rest
    return f"{module}_{rest}" if rest else None
