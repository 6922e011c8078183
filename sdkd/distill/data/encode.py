"""The frozen encoders. What comes out for an image or a caption never depends on what is encoded beside it.

Images are encoded alone and captions in chunks of one fixed shape: the kernels that a library picks for a shape, and so
the last bits, are then always the same, and training from a cache equals training from images.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.conditions import TEXT_EMBEDS
from sdkd.core.contract import torch_dtype
from sdkd.families import Family
from sdkd.models.clip_tokenizer import token_limit
from sdkd.models.conditioning import family_of, joined

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

Given = dict[str, torch.Tensor]
"""What a UNet is given beside latents and timesteps, by the names of its inputs: encoder_hidden_states [n, s, d], in
families that pool the text text_embeds [n, p], in those that take sizes time_ids [n, 6]. Of one caption without n."""
STATES = "encoder_hidden_states"
TEXT_CHUNK = 8  # captions per call of the text encoder
_ENCODER = ("encoder.", "quant_conv.")  # the part of a VAE that latents depend on


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass
def encode_image(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [c, h, w] of one image's posterior, times the VAE's scaling factor.

    `pixels` [3, height, width] in [-1, 1]; both results have the VAE's dtype and device. AutoencoderTiny has no
    distribution: the deviation of its latents is 0.
    """
    found: Any = vae.encode(pixels[None].to(vae.device, vae.dtype))
    scale = float(vae.config.scaling_factor)
    if hasattr(found, "latents"):
        return found.latents[0] * scale, torch.zeros_like(found.latents[0])
    posterior = found.latent_dist
    return posterior.mean[0] * scale, posterior.std[0] * scale


@dataclass(frozen=True)
class TextParts:
    """A pipeline's tokenizers and text encoders, in the order of its family.

    `zeros`: whether guidance leads away from zeros, not from the empty caption.
    """

    family: Family
    tokenizers: tuple[Any, ...]
    encoders: tuple[Any, ...]
    zeros: bool = False

    @staticmethod
    def of(pipe: StableDiffusionPipeline) -> TextParts:
        """Those of a pipeline."""
        family = family_of(pipe)
        tokenizers = tuple(getattr(pipe, name) for name in family.tokenizers)
        encoders = tuple(getattr(pipe, encoder.part) for encoder in family.text_encoders)
        return TextParts(family, tokenizers, encoders, bool(pipe.config.get("force_zeros_for_empty_prompt")))

    @property
    def named(self) -> dict[str, Any]:
        """The text encoders by their parts of a pipeline."""
        return {one.part: encoder for one, encoder in zip(self.family.text_encoders, self.encoders, strict=True)}

    @property
    def limit(self) -> int:
        """Tokens of a caption, start and end included."""
        pairs = zip(self.tokenizers, self.encoders, strict=True)
        return min(token_limit(tokenizer, encoder.config.max_position_embeddings) for tokenizer, encoder in pairs)

    def placed(self, device: torch.device | str, dtype: torch.dtype) -> TextParts:
        """With the encoders of `placed`."""
        return replace(self, encoders=tuple(placed(encoder, device, dtype) for encoder in self.encoders))

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Those captions that have more tokens than the limit, and are cut."""
        return list(dict.fromkeys(cut for one in self.tokenizers for cut in too_long(one, captions, self.limit)))


@torch.no_grad()
def encode_captions(
    parts: TextParts,
    captions: Sequence[str],
    device: torch.device | str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Given:
    """Text embeddings [n, s, d] and, in families that pool it, [n, p] of captions, in the text encoders' dtype.

    On `device` (None: the text encoders'). `check` is called before each chunk. Captions are padded and cut to s tokens
    (the parts' `limit`); the last chunk is filled up with the empty caption.
    """
    padded = [*captions, *[""] * (-len(captions) % TEXT_CHUNK)] or [""] * TEXT_CHUNK
    chunks = []
    for start in range(0, len(padded), TEXT_CHUNK):
        check()
        found = _encoded(parts, padded[start : start + TEXT_CHUNK])
        chunks.append({name: value.to(device or value.device) for name, value in found.items()})
    return {name: value[: len(captions)] for name, value in together(torch.cat, chunks).items()}


def _encoded(parts: TextParts, captions: list[str]) -> Given:
    """As diffusers' pipelines of the family: see `joined`."""
    inner = parts.family.hidden_states
    states, pooled = joined(
        parts.family,
        [
            encoder(tokens(tokenizer, captions, parts.limit).to(encoder.device), output_hidden_states=inner)
            for tokenizer, encoder in zip(parts.tokenizers, parts.encoders, strict=True)
        ],
    )
    return {STATES: states} if pooled is None else {STATES: states, TEXT_EMBEDS: pooled}


def together(join: Callable[[list[torch.Tensor]], torch.Tensor], rows: Sequence[Given]) -> Given:
    """Rows as one, input by input: `join` is torch.stack or torch.cat."""
    return {name: join([row[name] for row in rows]) for name in rows[0]}


def tokens(tokenizer: CLIPTokenizer, captions: list[str], limit: int) -> torch.Tensor:
    """Token ids [n, limit] int64, padded and cut to the length that the text encoder was trained with."""
    found = tokenizer(captions, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    ids: torch.Tensor = found.input_ids
    return ids


def too_long(tokenizer: CLIPTokenizer, captions: Sequence[str], limit: int) -> list[str]:
    """Those captions that have more than `limit` tokens, and are cut."""
    # A token stands for one byte or more: only these need counting.
    long = [caption for caption in captions if len(caption.encode(errors="replace")) > limit - 2]
    if not long:
        return []
    found = tokenizer(long, truncation=False, verbose=False).input_ids
    return [caption for caption, ids in zip(long, found, strict=True) if len(ids) > limit]


def said_of_cut(captions: Sequence[str], limit: int) -> str:
    """What to tell of captions that were cut."""
    have, were = ("s have", "were") if len(captions) != 1 else (" has", "was")
    return (
        f"{len(captions)} caption{have} more than the {limit} tokens that the text encoder reads, and {were} cut there "
        f"(one begins {min(captions)[:60]!r})"
    )


def placed(module: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The module on the device in the dtype, frozen: itself when it is there already, else a copy."""
    if module.device != torch.device(device) or module.dtype != dtype:
        module = copy.deepcopy(module)
        torch.nn.Module.to(module, device, dtype)  # torch's own: diffusers' warns about every change of dtype
    return module.eval().requires_grad_(False)


def weights_sha256(module: torch.nn.Module, dtype: torch.dtype, prefixes: tuple[str, ...] = ("",)) -> str:
    """SHA-256 of a module's weights as they are in `dtype`; only of those whose names start with one of `prefixes`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def model_digests(pipe: StableDiffusionPipeline, precision: str) -> dict[str, str]:
    """SHA-256 of the weights of the VAE's encoder and of the text encoders, as they are in `precision`."""
    return {"vae": vae_digest(pipe.vae, precision), **text_digests(TextParts.of(pipe), precision)}


def text_digests(parts: TextParts, precision: str) -> dict[str, str]:
    """SHA-256 of the weights of text encoders, by their parts, as they are in `precision`."""
    return {part: weights_sha256(encoder, torch_dtype(precision)) for part, encoder in parts.named.items()}


def vae_digest(vae: Any, precision: str) -> str:
    """SHA-256 of the weights of a VAE's encoder, as they are in `precision`."""
    return weights_sha256(vae, torch_dtype(precision), _ENCODER)
