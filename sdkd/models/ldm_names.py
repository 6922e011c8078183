"""Names of weights in the original code's files (ldm of Stable Diffusion, sgm of SDXL) for those of diffusers' modules.

One table for both directions. A UNet's numbers follow from its blocks (`Layout`), which follow from its config, or from
the names of a file: students need no table of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sdkd.errors import ModelError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SPACING = 3  # blocks a level that diffusers' conversion script counts, however few there are
_CROSS_MID, _PLAIN_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}  # rows of OpenCLIP's in_proj, in its order
Depths = tuple[int, ...]  # transformers of each layer of a block


class Place(NamedTuple):
    """Where a file has one weight: its name there, and what differs: the `third` of the rows that it is, whether it
    is `transposed`, whether it is a matrix that the file has as a convolution of one `pixel`.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    pixel: bool = False


@dataclass(frozen=True)
class Layout:
    """The blocks of a UNet: the width of each level, and how many transformers each layer has (0: no attention).

    `up` begins with the deepest level. `mid` is None where there is no mid block, 0 for one resnet alone. `spaced`:
    numbered in threes, as diffusers' script to the original layout does with levels that have fewer blocks.
    """

    widths: tuple[int, ...]
    down: tuple[Depths, ...]
    mid: int | None
    up: tuple[Depths, ...]
    spaced: bool = False

    @staticmethod
    def of(config: Mapping[str, Any]) -> Layout:
        """Of a UNet's whole config."""
        levels = len(config["block_out_channels"])
        layers = _per_level(config["layers_per_block"], levels)
        down = _per_level(config["transformer_layers_per_block"], levels)
        up = _per_level(config.get("reverse_transformer_layers_per_block") or tuple(reversed(down)), levels)
        mid = config.get("mid_block_type", _CROSS_MID)
        return Layout(
            tuple(config["block_out_channels"]),
            tuple(map(_depths, config["down_block_types"], layers, down)),
            _per_level(down[-1], 1)[0] if mid == _CROSS_MID else None if mid is None else 0,
            tuple(map(_depths, config["up_block_types"], (count + 1 for count in reversed(layers)), up)),
        )

    @property
    def config(self) -> dict[str, Any]:
        """The entries of a UNet's config that say this; ModelError where none can."""
        attention = [any(depths) for depths in (*self.down, *self.up)]
        down, up = attention[: len(self.down)], attention[len(self.down) :]
        if any(0 in depths for depths, has in zip((*self.down, *self.up), attention, strict=True) if has):
            raise ModelError("its UNet has layers with and without attention in one block, and diffusers has none such")
        counts = [len(depths) for depths in self.down]
        entries = [_entry(depths) for depths in self.down]
        if self.mid:
            entries[-1] = entries[-1] if down[-1] else self.mid
            if _per_level(entries[-1], 1)[0] != self.mid:
                raise ModelError(f"its UNet's mid block has {self.mid} transformers, the level above it {entries[-1]}")
        mirrored = all(isinstance(entry, int) for entry in entries) and self.up == tuple(
            (depths[0],) * (len(depths) + 1) for depths in reversed(self.down)
        )
        return {
            "block_out_channels": self.widths,
            "layers_per_block": counts[0] if len(set(counts)) == 1 else tuple(counts),
            "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in down),
            "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in up),
            "mid_block_type": _CROSS_MID if self.mid else None if self.mid is None else _PLAIN_MID,
            "transformer_layers_per_block": entries[0] if set(entries) == {entries[0]} else tuple(entries),
            "reverse_transformer_layers_per_block": None if mirrored else tuple(_entry(depths) for depths in self.up),
        }

    def modules(self) -> Iterator[tuple[str, str]]:
        """Every module of the blocks by diffusers' name and by the file's, without its prefix."""
        place = 1
        for level, depths in enumerate(self.down):
            yield from _layers("down", "input", level, place, depths)
            place += self._step(depths, len(depths) + 1)
            if level + 1 < len(self.down):
                yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place - 1}.0.op"
        if self.mid is not None:
            yield "mid_block.resnets.0", "middle_block.0"
        if self.mid:
            yield from (("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.1", "middle_block.2"))
        place = 0
        for level, depths in enumerate(self.up):
            yield from _layers("up", "output", level, place, depths)
            place += self._step(depths, len(depths))
            if level + 1 < len(self.up):
                apart = self.spaced and len(depths) < SPACING  # in a block of its own
                index = min(level, 1) if apart else int(depths[-1] > 0)
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{place - 1}.{index + 1}.conv"

    def _step(self, depths: Depths, blocks: int) -> int:
        if self.spaced and blocks > SPACING:
            raise ModelError(f"its UNet has {len(depths)} layers in a level, too many to number them in threes")
        return SPACING if self.spaced else blocks


def read_layout(tensors: Mapping[str, Any], prefix: str = UNET) -> Layout:
    """The layout of a file's UNet, by names and `shape`s alone; ModelError for blocks that fit none."""
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    inputs, outputs = (_numbered(f"{side}_blocks", names) for side in ("input", "output"))
    down: list[list[int]] = [[]]
    widths: list[int] = []
    for number, parts in sorted(inputs.items()):
        if "0.op.weight" in parts:
            down.append([])
        elif "0.in_layers.2.weight" in parts:
            down[-1].append(_count(parts))
            widths[len(down) - 1 :] = [tensors[f"{prefix}input_blocks.{number}.0.in_layers.2.weight"].shape[0]]
    up: list[list[int]] = [[]]
    for _, parts in sorted(outputs.items()):
        up[-1] += [_count(parts)] if "0.in_layers.2.weight" in parts else []
        if parts & {"1.conv.weight", "2.conv.weight"}:
            up.append([])
    middle = {name.removeprefix("middle_block.") for name in names if name.startswith("middle_block.")}
    layers = [len(depths) for depths in down]
    if [len(depths) - 1 for depths in reversed(up)] != layers or not all(layers):
        raise ModelError(f"its UNet has blocks of {layers} layers down and {[len(depths) for depths in up]} up")
    found = Layout(tuple(widths), tuple(map(tuple, down)), _count(middle) if middle else None, tuple(map(tuple, up)))
    return replace(found, spaced=set(outputs) != set(range(len(outputs))) or set(inputs) != set(range(len(inputs))))


def _numbered(kind: str, names: list[str]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for name in names:
        if match := re.fullmatch(rf"{kind}\.(\d+)\.(.+)", name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _count(parts: set[str]) -> int:
    """Transformers of a layer, by the names in its block."""
    return len({part.split(".")[2] for part in parts if part.startswith("1.transformer_blocks.")})


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def _depths(kind: str, layers: int, depth: Any) -> Depths:
    return _per_level(depth, layers) if kind.startswith("CrossAttn") else (0,) * layers


def _entry(depths: Depths) -> int | Depths:
    return max(depths[0], 1) if len(set(depths)) == 1 else depths


def _layers(side: str, original: str, level: int, place: int, depths: Depths) -> Iterator[tuple[str, str]]:
    for layer, depth in enumerate(depths):
        yield f"{side}_blocks.{level}.resnets.{layer}", f"{original}_blocks.{place + layer}.0"
        if depth:
            yield f"{side}_blocks.{level}.attentions.{layer}", f"{original}_blocks.{place + layer}.1"


_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embedding.cond_proj",  # of LCM's guidance: no code but diffusers' has it
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE = {
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.", r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.", r"_blocks\.(\d+)\.resnets\.": r".\1.block.",
    r"_blocks\.(\d+)\.(down|up)samplers\.0\.": r".\1.\2sample.", r"\.conv_norm_out\.": ".norm_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.", r"\.group_norm\.": ".norm.", r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".proj_out.",
}  # fmt: skip
_VAE_RESNET = r"(norm1|conv1|norm2|conv2|nin_shortcut)"
_VAE_NAME = re.compile(
    rf"((post_)?quant_conv|(en|de)coder\.(conv_in|conv_out|norm_out|mid\.block_[12]\.{_VAE_RESNET}"
    rf"|mid\.attn_1\.(norm|q|k|v|proj_out)|(down|up)\.\d+\.(block\.\d+\.{_VAE_RESNET}|(down|up)sample\.conv)))"
    r"\.(weight|bias)"
)
_OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip


def unet_places(names: Iterable[str], layout: Layout) -> dict[str, Place]:
    """Where a file has a UNet's weights, by diffusers' names; names that it has no place for are left out."""
    modules = {**_OUTSIDE, **dict(layout.modules())}
    found = {}
    for name in names:
        own = next((own for own in _heads(name) if own in modules), None)
        if own is None:
            continue
        rest = name.removeprefix(own).removeprefix(".")
        if ".resnets." in own + ".":
            part, _, kind = rest.partition(".")
            if part not in _RESNET:
                continue
            rest = f"{_RESNET[part]}.{kind}"
        found[name] = Place(f"{UNET}{modules[own]}.{rest}")
    return found


def _heads(name: str) -> Iterator[str]:
    """The modules that a weight lies in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def vae_places(names: Iterable[str], levels: int) -> dict[str, Place]:
    """Where a file has the weights of an AutoencoderKL with this number of levels; as `unet_places`."""
    found = {}
    for name in names:
        original = name
        for pattern, text in _VAE.items():
            original = re.sub(pattern, text, original)
        original = re.sub(r"\.up\.(\d+)", lambda match: f".up.{levels - 1 - int(match[1])}", original)
        if _VAE_NAME.fullmatch(original):
            matrix = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", original)
            found[name] = Place(VAE + original, pixel=matrix is not None)
    return found


def text_places(names: Iterable[str], prefix: str) -> dict[str, Place]:
    """Where a file has a text encoder's weights: by the `prefix`, as CLIP (`...transformer.`) or as OpenCLIP."""
    found = {}
    for name in names:
        own = name.removeprefix("text_model.")
        if prefix.endswith("transformer."):
            found[name] = Place(prefix + (own if own.startswith("text_projection.") else f"text_model.{own}"))
        elif own == "text_projection.weight":
            found[name] = Place(f"{prefix}text_projection", transposed=True)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", own):
            attention = f"{prefix}transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            found[name] = Place(attention, third=_THIRDS[match[2]])
        else:
            for part, original in _OPEN_CLIP.items():
                own = re.sub(rf"(^|\.){re.escape(part)}(?=\.|$)", rf"\g<1>{original}", own)
            found[name] = Place(prefix + own)
    return found
