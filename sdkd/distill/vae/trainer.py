"""A small VAE learns both ways from a full one: to decode its latents, and to encode what it decodes from them.

Latents alone are needed, scaled as the UNet sees them: so a cache teaches what its images would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from sdkd.core.console import Progress, quiet
from sdkd.core.contract import torch_dtype, vae_scale
from sdkd.distill.data.encode import placed
from sdkd.distill.data.latents import Latents
from sdkd.distill.data.order import draw_at, draw_latents
from sdkd.distill.data.rows import CaptionedImages
from sdkd.distill.training.batches import Place, Sample
from sdkd.distill.training.finite import check_weights, not_finite
from sdkd.distill.training.setup import make_optimizer, make_samples, pick_device
from sdkd.distill.training.trainer import lr_factor
from sdkd.distill.vae.config import VaeConfig
from sdkd.distill.vae.losses import make_losses
from sdkd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import AutoencoderTiny


def new_vae(teacher: Any, config: VaeConfig) -> AutoencoderTiny:
    """An untrained VAE of TAESD's shape that stands for `teacher`: it takes latents as the UNet makes them, so that its
    scaling factor is 1.
    """
    from diffusers import AutoencoderTiny

    levels = vae_scale(teacher.config).bit_length()
    inner = config.blocks * (levels - 1) if len(config.blocks) == 1 else config.blocks
    if len(inner) != levels - 1:
        raise InputError(
            f"blocks {', '.join(map(str, inner))} are {len(inner)} numbers, and this VAE doubles the image "
            f"{levels - 1} times: give one number, or {levels - 1}"
        )
    blocks = (*inner, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return AutoencoderTiny(
            in_channels=teacher.config.in_channels,
            out_channels=teacher.config.out_channels,
            latent_channels=teacher.config.latent_channels,
            encoder_block_out_channels=(config.width,) * levels,
            decoder_block_out_channels=(config.width,) * levels,
            num_encoder_blocks=blocks[::-1],
            num_decoder_blocks=blocks,
        )


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images [b, 3, h, w] float32 of a VAE, about -1 to 1, from latents [b, c, h, w] as the UNet makes them."""
    scaled = latents / float(vae.config.scaling_factor)
    image: torch.Tensor = vae.decode(scaled.to(vae.device, vae.dtype)).sample
    return image.float()


class VaeTrainer:
    """Teacher, small VAE, data and optimizer of one run; `step` does one optimizer step.

    `unet_config` says how large the teacher's own latents are.
    """

    def __init__(
        self,
        teacher: Any,
        vae: AutoencoderTiny,
        data: CaptionedImages | Latents,
        config: VaeConfig,
        unet_config: Mapping[str, Any],
        progress: Progress = quiet,
    ) -> None:
        run = config.run
        self.config, self.vae = config, vae
        self.device = pick_device(run.device, run.precision)
        self.dtype = torch_dtype(run.precision)
        self.losses = make_losses(config.losses, self.device)
        self.teacher = placed(teacher, self.device, self.dtype)
        sizes: Any = SimpleNamespace(unet=SimpleNamespace(config=unet_config), vae=self.teacher)
        place = Place(0, 1, self.device)
        self.samples, self.order = make_samples(sizes, self.teacher, data, run, place, progress)
        torch.nn.Module.to(vae, self.device, torch.float32)
        vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.parameters = list(vae.requires_grad_(True).train().parameters())
        self.optimizer = make_optimizer(self.parameters, run)
        self.done = 0
        self._stream: Iterator[Sample] = iter(())
        self.start(0)

    def start(self, step: int) -> None:
        """Go on with optimizer step `step` (from 0)."""
        self.close()
        self.done = step
        positions = itertools.count(step * self.config.run.batch_size)
        self._stream = iter(self.samples.stream((place, self.order.index(place)) for place in positions))

    def close(self) -> None:
        """Stop reading ahead."""
        if close := getattr(self._stream, "close", None):
            close()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.config.run.learning_rate * lr_factor(self.done, self.config.run)

    def latents(self) -> tuple[torch.Tensor, list[tuple[int, int, str]]]:
        """The next batch [b, c, h, w] float32, drawn from the posteriors, and for messages what is in it."""
        rows = list(itertools.islice(self._stream, self.config.run.batch_size))
        seed, nothing = self.config.run.seed, {"timesteps": 1, "caption_dropout": 0, "random_conditioning": 0}
        draws = [draw_at(seed, row.position, together=len(rows), **nothing) for row in rows]
        drawn = [draw_latents(draw, row.mean.cpu(), row.std.cpu()) for draw, row in zip(draws, rows, strict=True)]
        batch = torch.stack(drawn).to(self.device, memory_format=torch.channels_last)
        return batch, [(row.index, 0, row.caption) for row in rows]

    def step(self) -> dict[str, torch.Tensor]:
        """One optimizer step: each loss, and the gradient's norm unclipped.

        NotFiniteError, with the weights as they were, when a loss or the norm is not finite.
        """
        run = self.config.run
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        latents, named = self.latents()
        wanted = decode(self.teacher, latents)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            made = self.vae.decode(latents).sample.float()
            encoded = self.vae.encode(wanted.clamp(-1, 1)).latents.float()
        found = {f"loss/{name}": loss(made, wanted) for name, loss in self.losses.items()}
        total = sum(weight * found[f"loss/{name}"] for name, weight in self.config.losses.items())
        found["loss/latents"] = F.mse_loss(encoded, latents)  # of the encoder, which shares nothing with the decoder
        values = {"loss/total": total + found["loss/latents"], **found}
        self.optimizer.zero_grad(set_to_none=True)
        values["loss/total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, run.max_grad_norm or float("inf"))
        values = {name: value.detach() for name, value in (values | {"grad_norm": norm}).items()}
        if not torch.stack([values["loss/total"], values["grad_norm"]]).isfinite().all():
            raise not_finite(self.done + 1, values, named)
        self.optimizer.step()
        self.done += 1
        return values

    def finish(self) -> None:
        """Freeze the small VAE; NotFiniteError when its weights are not finite."""
        check_weights(dict(self.vae.named_parameters()), self.done)
        self.vae.eval().requires_grad_(False)
        self.vae.zero_grad(set_to_none=True)
