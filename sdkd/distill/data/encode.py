"""The frozen encoders. What comes out for an image or a caption never depends on what is encoded beside it.

Images are encoded alone and captions in chunks of one fixed shape: the kernels that a library picks for a shape, and so
the last bits, are then always the same, and training from a cache equals training from images.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.contract import torch_dtype
from sdkd.models.clip_tokenizer import token_limit

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

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


@torch.no_grad()
def encode_captions(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    captions: Sequence[str],
    device: torch.device | str | None = None,
    check: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Text embeddings [n, s, d] of captions in the text encoder's dtype, on `device` (None: the text encoder's).

    `check` is called before each chunk.

    Captions are padded and cut to s tokens (`limit_of`); the last chunk is filled up with the empty caption.
    """
    limit = limit_of(tokenizer, text_encoder)
    padded = [*captions, *[""] * (-len(captions) % TEXT_CHUNK)]
    chunks = []
    for start in range(0, len(padded), TEXT_CHUNK):
        check()
        ids = tokens(tokenizer, padded[start : start + TEXT_CHUNK], limit).to(text_encoder.device)
        output: Any = text_encoder(ids)
        chunks.append(output[0].to(device or text_encoder.device))
    if not chunks:
        shape = (0, limit, text_encoder.config.hidden_size)
        return torch.empty(shape, dtype=text_encoder.dtype, device=device or text_encoder.device)
    return torch.cat(chunks)[: len(captions)]


def limit_of(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> int:
    """Tokens of a caption, start and end included."""
    return token_limit(tokenizer, text_encoder.config.max_position_embeddings)


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
    """SHA-256 of the weights of the VAE's encoder and of the text encoder, as they are in `precision`."""
    return {
        "vae": vae_digest(pipe.vae, precision),
        "text_encoder": weights_sha256(pipe.text_encoder, torch_dtype(precision)),
    }


def vae_digest(vae: Any, precision: str) -> str:
    """SHA-256 of the weights of a VAE's encoder, as they are in `precision`."""
    return weights_sha256(vae, torch_dtype(precision), _ENCODER)
