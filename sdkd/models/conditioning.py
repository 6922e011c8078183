"""Prompts as a UNet takes them, in every family: embeddings of the text, and what goes with them in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sdkd.core.conditions import ADDED, TEXT_EMBEDS, TIME_IDS, takes_sizes
from sdkd.families import Family, family_of_pipeline, family_of_unet

if TYPE_CHECKING:
    import torch


class Encoded(NamedTuple):
    """Embeddings `[prompts, tokens, width]` of prompts and of what guidance leads away from, which is None without
    guidance; in families that pool the text also those `[prompts, width]`.
    """

    prompt: torch.Tensor
    negative: torch.Tensor | None
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by its class, or by its UNet where the class is another's."""
    return family_of_pipeline(type(pipe).__name__) or family_of_unet(pipe.unet.config)


def encode(pipe: Any, prompts: str | list[str], count: int, guided: bool) -> Encoded:
    """`count` embeddings of each prompt, as the text-to-image pipeline of the family makes them.

    Also of pipelines that have no method for it.
    """
    import diffusers

    kind = getattr(diffusers, family_of(pipe).by_channels[4])
    given = {"device": pipe.device, "num_images_per_prompt": count, "do_classifier_free_guidance": guided}
    return Encoded(*kind.encode_prompt(pipe, prompts, **given))


def joined(family: Family, outputs: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings `[n, tokens, width]` of the outputs of a family's text encoders, and the pooled text `[n, width]`.

    Where hidden states are read: those before the last, of all encoders side by side, and what the last one projects,
    as diffusers' StableDiffusionXLPipeline.encode_prompt; else the first encoder's last state, and no pooled text.
    """
    import torch

    if not family.hidden_states:
        return outputs[0][0], None
    return torch.cat([one.hidden_states[-2] for one in outputs], dim=-1), outputs[-1].text_embeds


def unet_arguments(pipe: Any, encoded: Encoded, copies: int, size: tuple[int, int]) -> dict[str, Any]:
    """What a UNet call gets beside latents and timestep for images of `size` (pixels, height and width).

    `copies` of each image go through the UNet together: the last of them with the prompt, the others without.
    """
    import torch

    found: dict[str, Any] = {"encoder_hidden_states": _stacked(encoded.prompt, encoded.negative, copies)}
    if takes_sizes(pipe.unet.config):
        assert encoded.pooled is not None
        pooled = _stacked(encoded.pooled, encoded.negative_pooled, copies)
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=pooled.device)
        found[ADDED] = {TEXT_EMBEDS: pooled, TIME_IDS: sizes.repeat(len(pooled), 1)}
    return found


def _stacked(prompt: torch.Tensor, negative: torch.Tensor | None, copies: int) -> torch.Tensor:
    import torch

    return torch.cat([*([negative] * (copies - 1) if negative is not None else []), prompt])
