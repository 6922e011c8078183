"""What a UNet can take beside latents, timestep and text, as rows: graph inputs, and the arguments that carry them.

The contract declares the inputs of the rows that a UNet has, by its config or because they were asked for; the exported
graph packs them into the arguments of UNet2DConditionModel, and the engine's module takes them out of those again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdkd.core.contract import Contract, TensorSpec, halved

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
TIMESTEP = "timestep"
GUIDANCE = "timestep_cond"  # the guidance scale's embedding (LCM, arXiv 2310.04378)
MID_RESIDUAL = "mid_block_additional_residual"
DOWN_RESIDUAL = "down_block_additional_residuals"
INNER_RESIDUAL = "down_intrablock_additional_residuals"
ADDED = "added_cond_kwargs"  # of UNet2DConditionModel: what comes in a dictionary
TEXT_EMBEDS, TIME_IDS = "text_embeds", "time_ids"
IMAGE_EMBEDS, IMAGE_SCALES = "image_embeds", "ip_adapter_scale"  # of IP-Adapters
TIME_NUMBERS = 6  # of SDXL: original size, crop and target size, height and width of each (arXiv 2307.01952, 2.2)
LARGEST_TIME_ID = 1024  # pixels


@dataclass(frozen=True)
class ImagePrompts:
    """What IP-Adapters (arXiv 2308.06721) take: the last axes of an image's embedding of each, which are a width, or
    tokens and a width, and the number of attention layers that they are in, each with a scale of its own.
    """

    embeddings: tuple[tuple[int, ...], ...] = ()
    layers: int = 0

    def __bool__(self) -> bool:
        return bool(self.embeddings)


@dataclass(frozen=True)
class Extras:
    """What a component can have beyond the usual: every layer's hidden states (text encoder); residuals of a ControlNet
    and of a T2I-Adapter, a timestep for each sample, IP-Adapters, the output for step caching (UNet).
    """

    hidden_states: bool = False
    residuals: bool = False
    inner_residuals: bool = False
    timesteps: bool = False
    images: ImagePrompts = ImagePrompts()
    image_tokens: int = 257  # of the image encoder: CLIP's ViT-H and ViT-bigG at 224 pixels have 16 x 16 and one
    deep_feature: bool = False


@dataclass(frozen=True)
class Condition:
    """One kind of input of a UNet, `name` in messages.

    `prefixes`: what the names of its graph inputs begin with; `specs`: its inputs for a config in a dtype, none where
    a UNet has no such condition; `pack`: arguments of UNet2DConditionModel from the tensors, `unpack`: the reverse,
    which takes what it finds out of the arguments: None or nothing stands for zeros, but where it is `needed`.
    `absent`: what to do where a graph has no such inputs, `misfit`: where their number is another.
    """

    name: str
    prefixes: tuple[str, ...]
    specs: Callable[[Config, str, Extras], tuple[TensorSpec, ...]]
    pack: Callable[[Sequence[Any]], dict[str, Any]]
    unpack: Callable[[dict[str, Any]], list[Any]]
    absent: str
    misfit: str
    needed: bool = False
    asked: bool = False  # for at the export: a pipeline by itself gives no such thing
    spare: int = 0  # tensors that may be missing at the end: zeros

    def of(self, contract: Contract) -> list[TensorSpec]:
        """Its inputs in a contract, in order."""
        return [spec for spec in contract.inputs if spec.name.startswith(self.prefixes)]


# Rows


def guidance_width(unet_config: Config) -> int | None:
    """Width of the guidance embedding that a UNet takes, if any."""
    return unet_config.get("time_cond_proj_dim")


def _guidance(config: Config, dtype: str, extras: Extras) -> tuple[TensorSpec, ...]:
    width = guidance_width(config)
    return () if width is None else (TensorSpec(GUIDANCE, dtype, ("batch", width)),)


def takes_sizes(config: Config) -> bool:
    """Whether a UNet or ControlNet takes SDXL's conditions: a projected text embedding, and sizes."""
    return config.get("addition_embed_type") == "text_time"


def _sizes(config: Config, dtype: str, extras: Extras) -> tuple[TensorSpec, ...]:
    """Float32 in every precision: diffusers joins them with an embedding that is float32."""
    if not takes_sizes(config):
        return ()
    width = config["projection_class_embeddings_input_dim"] - TIME_NUMBERS * config["addition_time_embed_dim"]
    return (
        TensorSpec(TEXT_EMBEDS, "float32", ("batch", width)),
        TensorSpec(TIME_IDS, "float32", ("batch", TIME_NUMBERS)),
    )


def _residuals(config: Config, dtype: str, extras: Extras) -> tuple[TensorSpec, ...]:
    return residual_specs(config, dtype, DOWN_RESIDUAL, MID_RESIDUAL) if extras.residuals else ()


def residual_specs(config: Config, dtype: str, down: str, mid: str) -> tuple[TensorSpec, ...]:
    """One tensor per skip connection of a UNet's down blocks, in order, named `<down>.0`, ...; then the middle's.

    UNet2DConditionModel's order: `conv_in`, then of every block its layers and, but for the last block, its halving.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    counts = [layers] * len(widths) if isinstance(layers, int) else layers
    shapes = [(widths[0], 0)]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        shapes += [(width, level)] * count
        shapes += [(width, level + 1)] * (level < len(widths) - 1)
    names = [*(f"{down}.{index}" for index in range(len(shapes))), mid]
    return _features(names, dtype, [*shapes, (widths[-1], len(widths) - 1)])


def _features(names: Sequence[str], dtype: str, shapes: Sequence[tuple[int, int]]) -> tuple[TensorSpec, ...]:
    """Tensors by name, width and how often their sides are halved."""
    return tuple(
        TensorSpec(name, dtype, ("batch", width, halved("height", level), halved("width", level)))
        for name, (width, level) in zip(names, shapes, strict=True)
    )


def _inner(config: Config, dtype: str, extras: Extras) -> tuple[TensorSpec, ...]:
    """What a T2I-Adapter (arXiv 2302.08453) adds to every down block, and to the middle where it has one more.

    UNet2DConditionModel adds it before the halving of a block with attention, and after that of one without: SDXL's
    adapters halve with the first block, which has none.
    """
    if not extras.inner_residuals:
        return ()
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    last = len(widths) - 1
    shapes = [
        (width, level + ("CrossAttn" not in kind and level < last))
        for level, (width, kind) in enumerate(zip(widths, kinds, strict=True))
    ]
    shapes += [(widths[-1], last)] if config.get("mid_block_type", True) else []
    return _features([f"{INNER_RESIDUAL}.{index}" for index in range(len(shapes))], dtype, shapes)


def _images(config: Config, dtype: str, extras: Extras) -> tuple[TensorSpec, ...]:
    """An embedding of each image for each adapter, then a scale for each row, adapter and layer."""
    given = extras.images
    specs = [
        TensorSpec(f"{IMAGE_EMBEDS}.{index}", dtype, ("batch", "images", *axes))
        for index, axes in enumerate(given.embeddings)
    ]
    scales = TensorSpec(IMAGE_SCALES, "float32", ("batch", len(specs), given.layers))
    return (*specs, scales) if specs else ()


def _unpack_residuals(given: dict[str, Any]) -> list[Any]:
    down, middle = given.pop(DOWN_RESIDUAL, None), given.pop(MID_RESIDUAL, None)
    return [*(down or ()), *(() if middle is None else (middle,))]


def _from_added(given: dict[str, Any], *names: str) -> list[Any]:
    """Take what is there out of the arguments that come in a dictionary."""
    added = dict(given.pop(ADDED, None) or {})
    found = [added.pop(name) for name in names if added.get(name) is not None]
    if added:
        given[ADDED] = added
    return found


def _unpack_guidance(given: dict[str, Any]) -> list[Any]:
    found = given.pop(GUIDANCE, None)
    return [] if found is None else [found]


CONDITIONS = (
    Condition(
        "sizes",
        (TEXT_EMBEDS, TIME_IDS),
        _sizes,
        lambda tensors: {ADDED: dict(zip((TEXT_EMBEDS, TIME_IDS), tensors, strict=True))},
        lambda given: _from_added(given, TEXT_EMBEDS, TIME_IDS),
        "this UNet takes no sizes and no pooled text, as SDXL's does",
        f"SDXL's UNet needs {ADDED} with {TEXT_EMBEDS} and {TIME_IDS}, as its pipelines give them",
        needed=True,
    ),
    Condition(
        "guidance",
        (GUIDANCE,),
        _guidance,
        lambda tensors: {GUIDANCE: tensors[0]},
        _unpack_guidance,
        "its UNet was not distilled with a guidance embedding (its config has no time_cond_proj_dim)",
        "make it with the pipeline's get_guidance_scale_embedding(scales, embedding_dim=WIDTH)",
    ),
    Condition(
        "residuals, one per skip connection and the middle's",
        (DOWN_RESIDUAL, MID_RESIDUAL),
        _residuals,
        lambda tensors: {DOWN_RESIDUAL: tuple(tensors[:-1]), MID_RESIDUAL: tensors[-1]},
        _unpack_residuals,
        "export the model with --controlnet for residual inputs",
        "a ControlNet fits the UNet that it was made for, not a student with fewer blocks",
        asked=True,
    ),
    Condition(
        "residuals of a T2I-Adapter",
        (INNER_RESIDUAL,),
        _inner,
        lambda tensors: {INNER_RESIDUAL: list(tensors)},
        lambda given: list(given.pop(INNER_RESIDUAL, None) or ()),
        "export the model with --t2i-adapter for the residuals of a T2I-Adapter",
        "a T2I-Adapter fits the UNet that it was made for, not a student with fewer blocks",
        asked=True,
        spare=1,
    ),
    Condition(
        "embeddings of images, and the scales",
        (IMAGE_EMBEDS, IMAGE_SCALES),
        _images,
        lambda tensors: {ADDED: {IMAGE_EMBEDS: list(tensors)}},
        lambda given: [tensor for every in _from_added(given, IMAGE_EMBEDS) for tensor in every],
        "export the model with --ip-adapter FILE, or the pipeline that has the IP-Adapter",
        "give one tensor for each IP-Adapter of the bundle",
        asked=True,
    ),
)


def condition_specs(config: Config, dtype: str, extras: Extras = Extras()) -> tuple[TensorSpec, ...]:
    """The inputs of all conditions that a UNet has, in the order of the rows."""
    return tuple(spec for row in CONDITIONS for spec in row.specs(config, dtype, extras))


def image_specs(contract: Contract) -> list[TensorSpec]:
    """The inputs for embeddings of images, one for each IP-Adapter of a UNet."""
    return [spec for spec in contract.inputs if spec.name.startswith(IMAGE_EMBEDS)]


def asked_for(contract: Contract) -> str | None:
    """The first kind of input that a UNet has because it was asked for, in words; None where there is none."""
    found = (row.name for row in CONDITIONS if row.asked and row.of(contract))
    timesteps = (f"a {spec.name} for each sample" for spec in contract.inputs if spec.name == TIMESTEP and spec.axes)
    return next(found, next(timesteps, None))


def pack(contract: Contract, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel (ControlNetModel) from a graph's inputs after the text, in the contract's
    order.
    """
    found: dict[str, Any] = {}
    rest = list(tensors)
    for row in CONDITIONS:
        if specs := row.of(contract):
            more = row.pack(rest[: len(specs)])
            both = {**found.get(ADDED, {}), **more.get(ADDED, {})}
            found |= more | ({ADDED: both} if both else {})
            rest = rest[len(specs) :]
    return found


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of graph inputs: those that come in a dictionary beside the others."""
    return {**{name: value for name, value in arguments.items() if name != ADDED}, **(arguments.get(ADDED) or {})}


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    added = {name: tensor for name, tensor in tensors.items() if name in (TEXT_EMBEDS, TIME_IDS)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in added}
    return rest | ({ADDED: added} if added else {})
