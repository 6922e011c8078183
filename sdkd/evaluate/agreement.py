"""Agreement with the teacher: the same latents, noise and timesteps for every UNet, and images of the same seeds.

Both need no judge and no real images, and say how far a student is from what it is trained to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sdkd.compare.measure.calls import native_side
from sdkd.core.conditions import TIME_IDS, nested, takes_sizes
from sdkd.core.console import Progress, quiet
from sdkd.core.contract import vae_scale
from sdkd.core.images import check_finite
from sdkd.distill.data.buckets import Sizes, View, fit
from sdkd.distill.data.encode import Given, TextParts, encode_captions, encode_image
from sdkd.distill.data.latents import Latents, sizes_of
from sdkd.distill.data.reader import Reader
from sdkd.distill.data.rows import CaptionedImages, row_caption
from sdkd.errors import InputError, ModelError
from sdkd.models.generation import Generation
from sdkd.models.schedulers import scheduler_like

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from PIL.Image import Image

BUCKETS = 10  # equal parts of the training timesteps
# What must agree for one input to fit both UNets.
_FIXED = ("in_channels", "out_channels", "cross_attention_dim", "time_cond_proj_dim", "addition_embed_type")


@dataclass(frozen=True)
class Probe:
    """What every UNet is asked: n images, each noised once in every timestep bucket, and the teacher's answers.

    The noise of image i and its timesteps come from a generator seeded by seed + i alone.
    """

    noisy: torch.Tensor  # [n, buckets, c, h, w] float32
    timesteps: torch.Tensor  # [n, buckets] int64
    given: Given  # what goes with each image, float32
    answers: torch.Tensor  # [n, buckets, c, h, w] float32, of the teacher
    edges: tuple[int, ...]  # first timestep of each bucket, and the number of timesteps
    fixed: Mapping[str, Any]  # config entries of the teacher that another UNet must share
    prediction_type: str
    unreadable: Mapping[int, str] = field(default_factory=dict)  # images that others took the place of


@dataclass(frozen=True)
class NoiseAgreement:
    """MSE between the noise (or velocity) that a UNet and its teacher predict; per image and bucket."""

    per_image: tuple[tuple[float, ...], ...]  # [n][buckets]

    @property
    def buckets(self) -> tuple[float, ...]:
        """Mean over images, lowest timesteps first."""
        return tuple(sum(column) / len(column) for column in zip(*self.per_image, strict=True))

    @property
    def mean(self) -> float:
        """Mean over all images and buckets."""
        return sum(self.buckets) / len(self.buckets)


@torch.no_grad()
def make_probe(
    teacher: StableDiffusionPipeline,
    images: CaptionedImages | Latents,
    count: int,
    seed: int = 0,
    progress: Progress = quiet,
) -> Probe:
    """Encode the first `count` images with the teacher's float32 VAE and text encoder, add noise, ask its UNet.

    Latents are the means of the posteriors, those of a cache as it holds them. An image that cannot be read is replaced
    by the next. Raises InputError without images or for another model's cache, ModelError for an inpainting UNet,
    TrainingError when more than 1 % cannot be read.
    """
    from diffusers import DDPMScheduler

    count = min(count, len(images))
    if count < 1:
        raise InputError("the data holds no images to ask the UNets about: give at least one")
    config = teacher.unet.config
    if config.in_channels != config.out_channels:
        raise ModelError(f"its UNet takes {config.in_channels} channels and gives {config.out_channels} (inpainting)")
    scheduler = scheduler_like(teacher.scheduler, DDPMScheduler)
    latents, captions, sizes, unreadable = _encoded(teacher, images, count)
    given = {name: value.cpu().float() for name, value in encode_captions(TextParts.of(teacher), captions).items()}
    if takes_sizes(config):
        given[TIME_IDS] = torch.tensor(sizes, dtype=torch.float32)
    edges = _edges(int(scheduler.config.num_train_timesteps))
    noisy, timesteps = _noised(latents.float(), scheduler, edges, seed)
    fixed = {name: config[name] for name in _FIXED}
    kind = str(scheduler.config.prediction_type)
    answers = _ask(teacher.unet, noisy, timesteps, given, progress)
    return Probe(noisy, timesteps, given, answers, edges, fixed, kind, unreadable)


def _encoded(
    teacher: StableDiffusionPipeline, images: CaptionedImages | Latents, count: int
) -> tuple[torch.Tensor, list[str], list[Sizes], Mapping[int, str]]:
    """Latents [n, c, h, w], captions, sizes, and what could not be read."""
    if isinstance(images, Latents):
        if check := getattr(images, "check", None):
            check(teacher)
        means = [images.posterior(index)[0].cpu() for index in range(count)]
        told = [sizes_of(images, index, vae_scale(teacher.vae.config)) for index in range(count)]
        return torch.stack(means), list(images.captions[:count]), told, {}
    size = native_side(teacher)

    def load(position: int, index: int) -> tuple[View, str]:
        row = images[index]
        return fit(row["image"], size, size), row_caption(row, index)

    reader = Reader(load, len(images), workers=0)
    latents, captions, sizes = [], [], []
    for _, (view, caption) in reader.rows((index, index) for index in range(count)):
        latents.append(encode_image(teacher.vae, view.pixels)[0].cpu())
        captions.append(caption)
        sizes.append(view.sizes)
    return torch.stack(latents), captions, sizes, reader.unreadable


def _edges(timesteps: int) -> tuple[int, ...]:
    return tuple(timesteps * place // BUCKETS for place in range(BUCKETS + 1))


def _noised(
    latents: torch.Tensor, scheduler: Any, edges: Sequence[int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [n, c, h, w] -> noisy [n, buckets, c, h, w] and timesteps [n, buckets]."""
    noisy, times = [], []
    for index, latent in enumerate(latents):
        generator = torch.Generator().manual_seed(seed + index)
        noise = torch.randn((len(edges) - 1, *latent.shape), generator=generator)
        bounds = itertools.pairwise(edges)
        drawn = torch.cat([torch.randint(low, high, (1,), generator=generator) for low, high in bounds])
        noisy.append(scheduler.add_noise(latent.expand_as(noise), noise, drawn))
        times.append(drawn)
    return torch.stack(noisy), torch.stack(times)


@torch.no_grad()
def _ask(
    unet: UNet2DConditionModel, noisy: torch.Tensor, timesteps: torch.Tensor, given: Given, progress: Progress
) -> torch.Tensor:
    """Predictions [n, buckets, c, h, w] float32 on the CPU; one image's buckets are a batch."""
    answers = []
    for index in range(len(noisy)):
        progress(f"noise prediction of image {index + 1} of {len(noisy)}", index / len(noisy))
        own = {name: value[index].expand(noisy.shape[1], *value.shape[1:]) for name, value in given.items()}
        placed = {
            name: value.to(unet.device, value.dtype if name == TIME_IDS else unet.dtype) for name, value in own.items()
        }
        sample, times = noisy[index].to(unet.device, unet.dtype), timesteps[index].to(unet.device)
        answers.append(unet(sample, times, **nested(placed)).sample.float().cpu())
    return torch.stack(answers)


def noise_agreement(pipe: StableDiffusionPipeline, probe: Probe) -> NoiseAgreement:
    """How far a pipeline's UNet is from the probe's teacher; ModelError when the two cannot take the same input."""
    differing = [name for name, value in probe.fixed.items() if pipe.unet.config[name] != value]
    if differing:
        name = differing[0]
        raise ModelError(f"its UNet has {name} {pipe.unet.config[name]}, the teacher's has {probe.fixed[name]}")
    kind = str(pipe.scheduler.config.get("prediction_type", "epsilon"))
    if kind != probe.prediction_type:
        raise ModelError(f"it predicts {kind}, the teacher {probe.prediction_type}")
    own = _ask(pipe.unet, probe.noisy, probe.timesteps, probe.given, quiet)
    errors = (own - probe.answers).double().square().mean(dim=(2, 3, 4))
    return NoiseAgreement(tuple(tuple(row) for row in errors.tolist()))


def draw_images(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], run: Generation, *, seed: int, progress: Progress = quiet
) -> list[Image]:
    """One image per prompt, each drawn alone; image n starts from the CPU generator of seed + n."""
    images: list[Image] = []
    for place, prompt in enumerate(prompts):
        progress(f"image {place + 1} of {len(prompts)}", place / len(prompts))
        generator = torch.Generator().manual_seed(seed + place)
        asked = {"num_inference_steps": run.steps, "guidance_scale": run.guidance_scale}
        made = pipe(prompt, generator=generator, output_type="np", **asked).images
        check_finite(made, f"image {place + 1} of {len(prompts)}")
        images += pipe.image_processor.numpy_to_pil(made)
    return images
