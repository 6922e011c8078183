"""Consistency distillation: a student that goes from any point of the teacher's path to its end in one call.

    z' = DDIM step of the teacher's guided prediction from z, k timesteps down      w drawn per sample
    loss = d(f(z, t), f(z', t - k)), f(z, t) = c_skip(t) z + c_out(t) x0(z, t)      the second without gradient

Source: LCM (Luo et al. 2023, arXiv 2310.04378), algorithm 1; scalings and loss as in diffusers' examples
(consistency_distillation/train_lcm_distill_sd_wds.py), which LCMScheduler draws by.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sdkd.distill.training.losses import prediction_type
from sdkd.errors import InputError, ModelError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

# Of the scalings of LCM's appendix B: at t = 0 the student's answer is its input.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
_LEAST_SIGNAL = 1e-3  # below, noise alone tells nothing of x0; Stable Diffusion's last timestep has 0.068


class Solver:
    """The noise schedule at the points of a DDIM solver; all tensors float32, per sample [b], on its device."""

    def __init__(self, scheduler: DDPMScheduler, count: int, device: torch.device) -> None:
        """`count` points of the schedule. InputError when it has fewer timesteps, ModelError for one that cannot be."""
        timesteps = int(scheduler.config.num_train_timesteps)
        if count > timesteps:
            raise InputError(f"solver_steps {count} is more than the noise schedule's {timesteps} timesteps: give 50")
        kept = scheduler.alphas_cumprod.to(device, torch.float32)
        self.signal, self.noise = kept.sqrt(), (1 - kept).sqrt()
        self.kind = prediction_type(scheduler.config)
        if self.kind == "epsilon" and float(self.signal.min()) < _LEAST_SIGNAL:
            raise ModelError(
                "the noise schedule ends in noise alone (zero terminal SNR), of which a model that predicts noise "
                "cannot tell the image: consistency distillation needs v_prediction there, or a schedule not rescaled"
            )
        self.skip = timesteps // count
        self.points = range(self.skip - 1, self.skip * count, self.skip)  # 19, 39, ..., 999: those of LCMScheduler

    def before(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The point before each timestep [b]; before the first comes 0."""
        return (timesteps - self.skip).clamp_min(0)

    def split(
        self, output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and noise [b, c, h, w], float32, that a prediction says a sample is made of."""
        signal, noise = _per_sample(self.signal[timesteps]), _per_sample(self.noise[timesteps])
        output, sample = output.float(), sample.float()
        if self.kind == "epsilon":
            return (sample - noise * output) / signal, output
        return signal * sample - noise * output, signal * output + noise * sample

    def mix(self, image: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The sample [b, c, h, w] of image and noise at timesteps [b]: a DDIM step ends there (eta 0)."""
        return _per_sample(self.signal[timesteps]) * image + _per_sample(self.noise[timesteps]) * noise

    def weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Factors [b] of a pseudo-Huber loss: the root of min-SNR's min(SNR, gamma), since it grows as |d|, not d^2.

        An error of predicted noise is one of the image times noise / signal, 14 at Stable Diffusion's last timestep:
        without factors the noisiest timesteps drown the others, and each further step of a drawing makes it worse.
        Of velocity it is times noise alone: SNR + 1, as in min-SNR.
        """
        part = self.signal[timesteps] if self.kind == "epsilon" else 1.0
        return (part / self.noise[timesteps]).clamp_max(math.sqrt(gamma))

    def answer(self, output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """f(z, t) [b, c, h, w], float32, from a UNet's prediction."""
        scaled = TIMESTEP_SCALING * timesteps.float()
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return _per_sample(skip) * sample.float() + _per_sample(out) * self.split(output, sample, timesteps)[0]


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def guided(output: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Guided prediction cond + w (cond - uncond) [b, c, h, w], float32, of one call's answer for both [2 b, c, h, w].

    `guidance` is w [b].
    """
    cond, uncond = output.float().chunk(2)
    return cond + _per_sample(guidance) * (cond - uncond)


def pseudo_huber(
    student: torch.Tensor, target: torch.Tensor, c: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c, a float32 scalar (Song and Dhariwal 2023, arXiv 2310.14189, section 3.3).

    `weights` [b]: factors of the samples; None: 1.
    """
    distance = ((student.float() - target.float()).square() + c * c).sqrt() - c
    return (distance if weights is None else distance * _per_sample(weights)).mean()


def guidance_embedding(guidance: torch.Tensor, width: int) -> torch.Tensor:
    """What a guidance-embedded UNet takes as `timestep_cond` [b, width], float32, for w [b], the guidance scale less 1.

    Sines, then cosines, of 1000 w, as LatentConsistencyModelPipeline.get_guidance_scale_embedding gives it.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=guidance.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * guidance.float()[:, None] * rates[None, :]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
