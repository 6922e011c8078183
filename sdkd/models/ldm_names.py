"""Names of weights in the original Stable Diffusion code's layout (LDM), for diffusers' names of the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sdkd.models.safetensors_file import Tensor
from sdkd.students.blocks import teacher_key as renamed

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", ("cond_stage_model.model.", "conditioner.embedders.0.model.")
# What the weights of each part begin with; SD 1.x has the first kind of text encoder, SD 2.x the others.
LDM_PREFIXES = {"unet": (UNET,), "vae": (VAE,), "text_encoder": (CLIP, *OPEN_CLIP)}
_LEVELS, _LAYERS = 4, 2
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_IN_PROJECTION = ("q_proj", "k_proj", "v_proj")  # one weight in open_clip, in this order


def _inner(module: str, ldm: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """A module's place, and those of its renamed parts."""
    yield module, ldm
    for own, original in names.items():
        yield f"{module}.{own}", f"{ldm}.{original}"


def _unet_places() -> Iterator[tuple[str, str]]:
    yield from {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "mid_block.attentions.0": "middle_block.1",
    }.items()  # fmt: skip
    for index, place in enumerate((0, 2)):
        yield from _inner(f"mid_block.resnets.{index}", f"middle_block.{place}", _UNET_RESNET)
    for level in range(_LEVELS):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        first, last = (_LAYERS + 1) * level, (_LAYERS + 1) * (level + 1)
        for layer in range(_LAYERS):
            yield from _inner(f"{down}.resnets.{layer}", f"input_blocks.{first + layer + 1}.0", _UNET_RESNET)
            yield f"{down}.attentions.{layer}", f"input_blocks.{first + layer + 1}.1"
        yield f"{down}.downsamplers.0.conv", f"input_blocks.{last}.0.op"
        for layer in range(_LAYERS + 1):
            yield from _inner(f"{up}.resnets.{layer}", f"output_blocks.{first + layer}.0", _UNET_RESNET)
            yield f"{up}.attentions.{layer}", f"output_blocks.{first + layer}.1"
        # The sampler comes after the attention, which the deepest level does not have.
        yield f"{up}.upsamplers.0.conv", f"output_blocks.{last - 1}.{2 if level else 1}.conv"


def _vae_places() -> Iterator[tuple[str, str]]:
    for half, side, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        for index in (0, 1):
            yield from _inner(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}", _VAE_RESNET)
        yield from _inner(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        for level in range(_LEVELS):
            own = f"{half}.{side}_blocks.{level}"
            place = f"{half}.{side}.{level if half == 'encoder' else _LEVELS - 1 - level}"
            for layer in range(_LAYERS + 1):
                yield from _inner(f"{own}.resnets.{layer}", f"{place}.block.{layer}", _VAE_RESNET)
            yield f"{own}.{sampler}rs.0.conv", f"{place}.{sampler}.conv"


_OPEN_CLIP_OUTSIDE = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{name}.{kind}": f"attn.in_proj_{kind}" for name in _IN_PROJECTION for kind in ("weight", "bias")},
}  # fmt: skip
_PLACES = {"unet": dict(_unet_places()), "vae": dict(_vae_places())}


def located(part: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor | str]:
    """Where a checkpoint has each weight of a part, by diffusers' name; for one that it lacks, its name in LDM.

    `shapes` are the wanted ones: attention of the VAE lies in the file as convolution of one pixel, and is taken as it
    is wanted; q, k and v of open_clip are thirds of one tensor.
    """
    if part == "text_encoder":
        prefix = next((prefix for prefix in OPEN_CLIP if any(name.startswith(prefix) for name in tensors)), None)
        return {name: _open_clip(name, tensors, prefix) if prefix else _clip(name, tensors) for name in shapes}
    prefix = LDM_PREFIXES[part][0]
    names = {name: prefix + renamed(name, _PLACES[part]) for name in shapes}
    return {name: _shaped(tensors[ldm], shapes[name]) if ldm in tensors else ldm for name, ldm in names.items()}


def _shaped(tensor: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """The tensor without the axes of length 1 that `wanted` lacks."""
    return tensor._replace(shape=wanted) if tensor.shape == (*wanted, 1, 1) else tensor


def _clip(name: str, tensors: Mapping[str, Tensor]) -> Tensor | str:
    """Some checkpoints, and newer versions of transformers, leave `text_model.` out."""
    bare = name.removeprefix("text_model.")
    places = (f"{CLIP}text_model.{bare}", CLIP + bare)
    return next((tensors[place] for place in places if place in tensors), places[0])


def _open_clip(name: str, tensors: Mapping[str, Tensor], prefix: str) -> Tensor | str:
    bare = name.removeprefix("text_model.")
    place = prefix + renamed(bare, _OPEN_CLIP_OUTSIDE)
    if bare.startswith("encoder.layers."):
        index, inner = bare.removeprefix("encoder.layers.").split(".", 1)
        place = f"{prefix}transformer.resblocks.{index}.{renamed(inner, _OPEN_CLIP_LAYER)}"
    if place not in tensors:
        return place
    third = next((index for index, part in enumerate(_IN_PROJECTION) if f".{part}." in name), None)
    return tensors[place] if third is None else tensors[place].rows(third, len(_IN_PROJECTION))
