"""IP-Adapters in a form that is traced: the same modules and weights, with scales that are a tensor."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sdkd.errors import ModelError
from sdkd.models.ip_adapter import check_projections, image_layers


class ScaledProjection(MultiIPAdapterImageProjection):
    """diffusers' projections of every adapter's images; the scales, which come behind, go on to the attention."""

    def forward(self, image_embeds: list[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings `[batch, images, ...]` and scales `[batch, adapters, layers]` to tokens, and the scales."""
        return [*super().forward(image_embeds[:-1]), image_embeds[-1]]


class ScaledAttention(nn.Module):
    """diffusers' IPAdapterAttnProcessor2_0 with the scales of its layer, of every row, in place of numbers.

    That one leaves an adapter out where its scale is 0, which cannot be traced.
    """

    def __init__(self, original: Any, layer: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip, self.layer = original.to_k_ip, original.to_v_ip, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: tuple[torch.Tensor, list[torch.Tensor]],
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of an image's places `[batch, places, width]` to text and images."""
        text, (*images, scales) = encoder_hidden_states

        def heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.flatten(1, -2).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        found = scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        for index, (image, to_k, to_v) in enumerate(zip(images, self.to_k_ip, self.to_v_ip, strict=True)):
            more = scaled_dot_product_attention(query, heads(to_k(image)), heads(to_v(image)))
            found = found + scales[:, index, self.layer].to(more.dtype)[:, None, None, None] * more
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](found.transpose(1, 2).flatten(2)))
        return result


def scalable(unet: Any) -> Any:
    """A UNet's IP-Adapters made traceable, in place; returns the module. ModelError for attention of another form."""
    layers = image_layers(unet)
    if not layers:
        return unet
    check_projections(unet)
    processors = dict(unet.attn_processors)
    for number, name in enumerate(layers):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        plain = (attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q) == (None,) * 4
        if not plain or attn.residual_connection or attn.rescale_output_factor != 1:
            raise ModelError(f"{name} of the UNet is no attention of a transformer, which an IP-Adapter needs")
        processors[name] = ScaledAttention(processors[name], number)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = ScaledProjection(list(unet.encoder_hid_proj.image_projection_layers))
    unet.config.encoder_hid_dim_type = "ip_image_proj"  # an attribute, as diffusers sets it
    return unet
