"""IP-Adapters (Ye et al. 2023, arXiv 2308.06721) in a UNet: what they read, and in which layers they are.

An IP-Adapter projects an image's embedding to a few tokens, and has keys and values of its own for them in every
layer of attention to the text; `sdkd.models.ip_adapter_file` loads one.
"""

from __future__ import annotations

from typing import Any

from sdkd.core.conditions import ImagePrompts
from sdkd.errors import ModelError

IP_ADAPTERS = "ip_adapters"  # key in a bundle's manifest: of its source, and of its UNet's details
# Projections that read an image's embedding alone, by diffusers' classes: its number of axes, and where the module
# has its width. FaceID-Plus reads CLIP's embedding from an attribute.
_WIDTHS = {
    "ImageProjection": (1, lambda layer: layer.image_embeds.in_features),
    "IPAdapterFaceIDImageProjection": (1, lambda layer: layer.ff.net[0].proj.in_features),
    "IPAdapterFullImageProjection": (2, lambda layer: layer.ff.net[0].proj.in_features),
    "IPAdapterPlusImageProjection": (2, lambda layer: layer.proj_in.in_features),
}


def _projections(unet: Any) -> list[Any]:
    found = getattr(unet, "encoder_hid_proj", None)
    return list(getattr(found, "image_projection_layers", ()))


def check_projections(unet: Any) -> None:
    """ModelError for an IP-Adapter whose projection reads more than a call of the UNet gives it."""
    for layer in _projections(unet):
        if (kind := type(layer).__name__) not in _WIDTHS:
            raise ModelError(
                f"the UNet has an IP-Adapter with {kind}, which sdkd does not export (FaceID-Plus is told CLIP's "
                f"embedding beside the call): give one with {', '.join(_WIDTHS)}"
            )


def image_prompts(unet: Any, tokens: int = 0) -> ImagePrompts:
    """What the IP-Adapters of a UNet take; empty where it has none. `tokens` of the image encoder's hidden states."""
    rows = [(_WIDTHS[type(layer).__name__], layer) for layer in _projections(unet)]
    embeddings = tuple((*(tokens,) * (axes - 1), width(layer)) for (axes, width), layer in rows)
    return ImagePrompts(embeddings, len(image_layers(unet)) if embeddings else 0)


def image_layers(unet: Any) -> list[str]:
    """The attention processors with an IP-Adapter's weights, in the order of the module: a column of scales each."""
    return [name for name, found in getattr(unet, "attn_processors", {}).items() if hasattr(found, "to_k_ip")]


def prompt_details(unet: Any) -> dict[str, Any]:
    """What the record of a component says of its IP-Adapters; nothing where it has none.

    `projections`: their classes in diffusers, which pipelines ask for; `layers`: as `image_layers`.
    """
    kinds = [type(layer).__name__ for layer in _projections(unet)]
    return {IP_ADAPTERS: {"projections": kinds, "layers": image_layers(unet)}} if kinds else {}
