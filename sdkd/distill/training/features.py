"""A UNet that returns the features of chosen modules with its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class FeatureUNet(nn.Module):
    """A UNet whose forward returns its output and the features of chosen modules.

    The features leave through the return value, so the same code serves eager, compiled and data-parallel modules.
    Hooks are set here, before any compilation; `close` removes them, which gives the UNet back as it was.
    """

    def __init__(self, unet: UNet2DConditionModel, modules: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self._found: dict[int, torch.Tensor] = {}
        self._count = len(modules)
        self._handles = [
            unet.get_submodule(name).register_forward_hook(self._keep(index)) for index, name in enumerate(modules)
        ]

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A down block returns (hidden states after its downsampler, skips); the others return one tensor.
            self._found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Noisy latents [b, c, h, w], timesteps [b], text [b, s, d] -> output [b, c, h, w] and features, in order."""
        self._found.clear()
        output = self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        features = [self._found[index] for index in range(self._count)]
        self._found.clear()  # keep no activation alive between calls
        return output, features

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
