"""What every subject is asked to do: whole images from equal noise, and the pipeline's parts as it calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdkd.compare.measure.pictures import Size, inputs_for, kind_of
from sdkd.compare.measure.subjects import native_side
from sdkd.compare.measure.timing import Work
from sdkd.core.contract import check_size, size_multiple
from sdkd.core.images import check_finite

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

UNET, TEXT_ENCODER, VAE_DECODER = "unet", "text_encoder", "vae_decoder"


@dataclass(frozen=True)
class Request:
    """What every subject is asked to do."""

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    seed: int
    size_px: int
    batch: int = 1  # images per call
    scheduler: str | None = None  # as `sdkd generate` takes it; None: each model's own
    copies: int = 2  # latents per image in a guided UNet call
    width_px: int | None = None  # None: square

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.size_px, self.width_px or self.size_px

    @property
    def guided(self) -> bool:
        """Whether all conditions go through the UNet together."""
        return self.guidance_scale > 1

    @property
    def unet_batch(self) -> int:
        """Latents per UNet call."""
        return self.batch * (self.copies if self.guided else 1)

    @property
    def image_prompts(self) -> tuple[str, ...]:
        """The prompt of every image: the first image of each prompt, then the second of each, and so on."""
        return self.prompts * self.batch

    def numbers(self, prompt: int) -> list[int]:
        """Numbers of the images that one call makes for prompt number `prompt`; image n starts from `seed + n`."""
        return list(range(prompt, len(self.image_prompts), len(self.prompts)))


def image_size(pipe: Any, size: Size | None) -> Size:
    """The asked height and width in pixels, or the model's own; InputError when they do not fit the model's levels."""
    height, width = size or (native_side(pipe),) * 2
    check_size(height, width, size_multiple(pipe.unet.config, pipe.vae.config))
    return height, width


def make_images(pipe: Any, request: Request, prompt: int) -> list[Image]:
    """The images of one prompt, from noise that is equal for every subject: float32 on the CPU, then cast.

    A pipeline that looks at images gets drawn ones: see `sdkd.compare.measure.pictures`.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(request.seed + number) for number in request.numbers(prompt)]
    shape = (1, pipe.vae.config.latent_channels, *_latent_sides(pipe, request))
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])  # [batch, c, h, w]
    way = kind_of(pipe)
    size = dict(zip(("height", "width"), request.size, strict=True)) if way.sized else {}
    made = pipe(
        [request.prompts[prompt]] * request.batch,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=generators,  # for schedulers that add noise in every step
        latents=noise.to(pipe.device, pipe.text_encoder.dtype),
        output_type="np",
        **size,
        **inputs_for(way, request.size, request.steps).arguments(way, request.batch),
    ).images
    check_finite(made, f"images of prompt {prompt + 1}")
    images: list[Image] = pipe.image_processor.numpy_to_pil(made)
    return images


def unet_calls(pipe: Any) -> int:
    """UNet calls of the last whole image: one for each of the scheduler's timesteps, which can be more than steps."""
    return len(pipe.scheduler.timesteps)


def step_work(pipe: Any, request: Request) -> Work:
    """One UNet call as the pipeline makes it: the first prompt's embeddings, seeded latents, a middle timestep."""
    import torch

    with torch.no_grad():
        prompt, negative = _encode(pipe, request.prompts[0], request.batch, request.guided)
    others = [negative] * (request.copies - 1) if request.guided else []
    states = torch.cat([*others, prompt])  # [batch, sequence, context]
    sample = _seeded(pipe, request, request.unet_batch, pipe.unet.config.in_channels).to(pipe.device, states.dtype)
    timestep = torch.tensor(500, device=pipe.device)
    return _without_gradients(lambda: pipe.unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0])


def text_work(pipe: Any, request: Request) -> Work:
    """A call's prompts to embeddings: the tokenizer, and the text encoder once, or twice with guidance."""
    prompts = [request.prompts[0]] * request.batch
    return _without_gradients(lambda: _encode(pipe, prompts, 1, request.guided))


def _encode(pipe: Any, prompts: str | list[str], count: int, guided: bool) -> Any:
    """Embeddings of prompts, `count` of each, and of the empty ones; also of pipelines that have no method for it."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.encode_prompt(pipe, prompts, pipe.device, count, guided)[:2]


def vae_work(pipe: Any, request: Request) -> Work:
    """A call's latents to pixels."""
    sample = _seeded(pipe, request, request.batch, pipe.vae.config.latent_channels)
    sample = sample.to(pipe.device, pipe.text_encoder.dtype)
    return _without_gradients(lambda: pipe.vae.decode(sample, return_dict=False)[0])


WORKS: dict[str, Callable[[Any, Request], Work]] = {UNET: step_work, TEXT_ENCODER: text_work, VAE_DECODER: vae_work}


def _latent_sides(pipe: Any, request: Request) -> tuple[int, int]:
    height, width = request.size
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def _seeded(pipe: Any, request: Request, batch: int, channels: int) -> torch.Tensor:
    """Latents [batch, channels, height, width] of the request's size and seed, float32 on the CPU."""
    import torch

    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn((batch, channels, *_latent_sides(pipe, request)), generator=generator)


def _without_gradients(call: Callable[[], object]) -> Work:
    import torch

    def work() -> object:
        with torch.no_grad():
            return call()

    return work
