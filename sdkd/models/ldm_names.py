"""Weights in the original Stable Diffusion code's layout (LDM), found by diffusers' names of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdkd.models.safetensors_file import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", ("cond_stage_model.model.", "conditioner.embedders.0.model.")
# What the weights of each part begin with; SD 1.x has the first kind of text encoder, SD 2.x the others.
LDM_PREFIXES = {"unet": (UNET,), "vae": (VAE,), "text_encoder": (CLIP, *OPEN_CLIP)}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, with as much of a tensor's ways as diffusers' conversion uses; nothing is read."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, index: tuple[Any, ...] | slice) -> _Stored:
        """Rows, or the two first axes of a convolution of one pixel."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if 0 in rest:
            return _Stored(self.tensor._replace(shape=self.shape[:2]) if set(self.shape[2:]) == {1} else self.tensor)
        start, end, _ = first.indices(self.shape[0])
        return _Stored(self.tensor.rows(start, end))

    def itself(self) -> _Stored:
        return self

    T = property(itself)
    clone = detach = contiguous = itself


def located(part: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a checkpoint has a part's weights, by diffusers' names, which are not always those of `module`.

    diffusers converts here where weights lie, not the weights: its `from_single_file` maps the whole file beside what
    is cast, and each is read when it is needed.
    """
    from diffusers.loaders import single_file_utils as ldm

    stored: dict[str, Any] = {name: _Stored(tensor) for name, tensor in tensors.items()}
    if part == "text_encoder":
        prefix = next((prefix for prefix in OPEN_CLIP if any(name.startswith(prefix) for name in tensors)), None)
        clip = ldm.convert_open_clip_checkpoint(module, stored, prefix) if prefix else None
        found = ldm.convert_ldm_clip_checkpoint(stored) if clip is None else clip
    else:
        found = getattr(ldm, f"convert_ldm_{part}_checkpoint")(stored, module.config)
    return {name: one.tensor for name, one in found.items()}
