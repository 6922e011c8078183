"""The VAE of a pipeline on engines: whole images, or tiles of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from engines.modules.base import EngineModule, cast_feeds, run_split
from engines.modules.tiles import OVERLAP, fitting_tile, in_tiles
from engines.sessions.base import Rebuild, Session
from sdkd.core.contract import is_tiny_vae, vae_scale
from sdkd.core.profiles import Range
from sdkd.errors import EngineError, RangeError

NO_ENCODER = (
    "this EngineVAE has no vae_encoder engine, which image-to-image and inpainting need: export and build "
    "the bundle with the component vae_encoder"
)
# Attributes of diffusers' VAEs and of ours that say how images are cut.
SWITCHES = ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


class EngineVAE(EngineModule):
    """Stands for AutoencoderKL or AutoencoderTiny; without an encoder session only `decode` works."""

    def __init__(self, decoder: Session, encoder: Session | None, config: Mapping[str, Any], dtype: torch.dtype,
                 device: torch.device, original: torch.nn.Module | None = None) -> None:  # fmt: skip
        self.is_tiny = is_tiny_vae(config)
        self.stands_for = AutoencoderTiny if self.is_tiny else AutoencoderKL
        super().__init__(decoder, config, dtype, device, original)
        self.encoder_session = encoder
        self.use_slicing = False
        self.use_tiling = False
        size = self.config.get("sample_size") or 512  # AutoencoderTiny's config has none
        self.scale = vae_scale(config)
        self.tile_sample_min_size: int = size if isinstance(size, int) else max(size)
        self.tile_latent_min_size = self.tile_sample_min_size // self.scale
        self.tile_overlap_factor = OVERLAP

    def sessions(self) -> Iterable[Session]:
        """The decoder's engine, and the encoder's when there is one."""
        return (self.session,) if self.encoder_session is None else (self.session, self.encoder_session)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Unscaled latents `[batch, channels, height, width]` to images in [-1, 1]; the generator is unused."""
        try:
            image = self._run(self.session, z, self.tile_latent_min_size, Fraction(self.scale))
        except RangeError as error:
            asked = {"z": z, "return_dict": return_dict} | ({} if self.is_tiny else {"generator": generator})
            return self._eagerly(error, asked, "decode")
        return DecoderOutput(sample=image) if return_dict else (image,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Images in [-1, 1] to the distribution of their unscaled latents, of a tiny autoencoder the latents.

        EngineError without an encoder engine.
        """
        asked = {"x": x, "return_dict": return_dict}
        if self.encoder_session is None:
            return self._eagerly(EngineError(NO_ENCODER), asked, "encode")
        tile = self.tile_sample_min_size // self.scale * self.scale
        try:
            found = self._run(self.encoder_session, x, tile, Fraction(1, self.scale))
        except RangeError as error:
            return self._eagerly(error, asked, "encode")
        if self.is_tiny:
            return AutoencoderTinyOutput(latents=found) if return_dict else (found,)
        latents = DiagonalGaussianDistribution(found)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def _run(self, session: Session, tensor: torch.Tensor, tile: int, scale: Fraction) -> torch.Tensor:
        """One engine on the whole tensor, or in tiles of at most `tile` where that is on and the engine takes them."""
        spec = session.contract.inputs[0]

        def whole(part: torch.Tensor) -> torch.Tensor:
            feeds = cast_feeds(session, {spec.name: part})
            result = run_split(session, feeds, limit=1 if self.use_slicing else None)
            return result[session.contract.outputs[0].name].to(tensor.dtype)

        if not self.use_tiling:
            return whole(tensor)
        sides = [(_side(profile, spec.axes[2]), _side(profile, spec.axes[3])) for profile in session.profiles]
        chosen = fitting_tile(sides, (tensor.shape[-2], tensor.shape[-1]), tile)
        if chosen == tuple(tensor.shape[-2:]):
            return whole(tensor)
        return in_tiles(whole, tensor, chosen, scale, self.tile_overlap_factor)

    def _eagerly(self, error: EngineError, asked: Mapping[str, Any], method: str) -> Any:
        if self.falls_back:
            switch(self, self.original)
        return self.fall_back(error, asked, method)

    def follow(self, before: object, rebuild: Rebuild | None, falls_back: bool = False) -> None:
        """As every engine module; slicing and tiling stay on, too."""
        super().follow(before, rebuild, falls_back)
        switch(before, self)

    def restore(self) -> Any:
        """As every engine module; slicing and tiling stay on, too."""
        eager = super().restore()
        switch(self, eager)
        return eager

    def enable_slicing(self) -> None:
        """Run one image at a time, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Run whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run images larger than a tile in overlapping tiles, of a size that the engine takes: see `.tiles`.

        A tile is `tile_sample_min_size` pixels wide (the model's native size), or what the engine's ranges allow.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Run whole images again."""
        self.use_tiling = False


def switch(source: Any, target: Any) -> None:
    """Give one VAE the slicing and tiling of another, as far as both have it; None has none."""
    for name in SWITCHES:
        if source is not None and target is not None and hasattr(source, name) and hasattr(target, name):
            setattr(target, name, getattr(source, name))


def _side(profile: Mapping[str, Range], axis: str | int) -> Range:
    return Range.fixed(axis) if isinstance(axis, int) else profile[axis]
