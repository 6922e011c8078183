"""What every subject is asked to do: whole images from equal noise, and the pipeline's parts as it calls them.

Pipelines that look at images get drawn ones: the same picture, mask and edges for every subject.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engines.generate.image_inputs import SEEING, TEXT, Inputs, PipelineKind, as_pipeline, kind_for, with_defaults
from sdkd.compare.measure.timing import Work
from sdkd.core.conditions import guidance_width
from sdkd.core.contract import check_size, native_size, size_multiple
from sdkd.core.images import check_finite
from sdkd.errors import ModelError
from sdkd.families import EMBEDDING
from sdkd.models.conditioning import encode, family_of, unet_arguments
from sdkd.models.generation import Generation

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

UNET, TEXT_ENCODER, VAE_DECODER = "unet", "text_encoder", "vae_decoder"
Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Asked:
    """The images that are asked for, the same of every subject."""

    prompts: tuple[str, ...]
    seed: int
    size_px: int
    batch: int = 1  # images per call
    width_px: int | None = None  # None: as wide as high, `size_px`

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.size_px, self.width_px or self.size_px

    @property
    def image_prompts(self) -> tuple[str, ...]:
        """The prompt of every image: the first image of each prompt, then the second of each, and so on."""
        return self.prompts * self.batch


@dataclass(frozen=True)
class Request(Asked):
    """What one subject is asked to do: images, with its own steps and guidance scale."""

    run: Generation = field(kw_only=True)
    copies: int = 2  # latents per image in a guided UNet call
    cache_interval: int = 1

    @property
    def guided(self) -> bool:
        """Whether all conditions go through the UNet together: not where the scale is an input of it."""
        return self.run.guidance_scale > 1 and self.copies > 1

    @property
    def unet_batch(self) -> int:
        """Latents per UNet call."""
        return self.batch * (self.copies if self.guided else 1)

    def numbers(self, prompt: int) -> range:
        """Numbers of the images that one call makes for prompt number `prompt`; image n starts from `seed + n`."""
        return range(prompt, len(self.image_prompts), len(self.prompts))


def native_side(pipe: Any) -> int:
    """Image side in pixels that a model was made for: the UNet's `sample_size` times the VAE's scale."""
    height, width = native_size(pipe.unet.config, pipe.vae.config) or (0, 1)
    if height != width:
        sample = pipe.unet.config.sample_size
        raise ModelError(f"the UNet's sample_size {sample!r} is not one integer: give the image size with --size")
    return height


def image_size(pipe: Any, size: Size | None) -> Size:
    """The asked height and width in pixels, or the model's own; InputError when they do not fit the model's levels."""
    height, width = size or (native_side(pipe),) * 2
    check_size(height, width, size_multiple(pipe.unet.config, pipe.vae.config))
    return height, width


def make_images(pipe: Any, request: Request, prompt: int) -> list[Image]:
    """The images of one prompt, from noise that is equal for every subject: float32 on the CPU, then cast."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(request.seed + number) for number in request.numbers(prompt)]
    shape = (1, pipe.vae.config.latent_channels, *_latent_sides(pipe, request))
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])  # [batch, c, h, w]
    kind = kind_of(pipe)
    size = dict(zip(("height", "width"), request.size, strict=True)) if kind.sized else {}
    made = pipe(
        [request.prompts[prompt]] * request.batch,
        num_inference_steps=request.run.steps,
        guidance_scale=request.run.guidance_scale,
        generator=generators,  # for schedulers that add noise in every step
        latents=noise.to(pipe.device, pipe.text_encoder.dtype),
        output_type="np",
        **size,
        **_inputs(kind, request.size, request.run.steps).arguments(kind, request.batch),
    ).images
    check_finite(made, f"images of prompt {prompt + 1}")
    images: list[Image] = pipe.image_processor.numpy_to_pil(made)
    return images


def step_work(pipe: Any, request: Request) -> Work:
    """One UNet call as the pipeline makes it: the first prompt's embeddings, seeded latents, a middle timestep.

    Where steps are cached: a whole call and those that reuse it.
    """
    import torch

    with torch.no_grad():
        encoded = encode(pipe, request.prompts[0], request.batch, request.guided)
    given = unet_arguments(pipe, encoded, request.copies, request.size) | {"return_dict": False}
    sample = latents_of(pipe, request, request.unet_batch, pipe.unet.config.in_channels)
    sample = sample.to(pipe.device, encoded.prompt.dtype)
    timesteps = torch.arange(500, 500 - request.cache_interval, -1, device=pipe.device)
    if (width := guidance_width(pipe.unet.config)) is not None:
        scales = torch.full((len(sample),), request.run.guidance_scale - 1)
        given["timestep_cond"] = pipe.get_guidance_scale_embedding(scales, width).to(sample)
    return torch.no_grad()(lambda: [pipe.unet(sample, timestep, **given)[0] for timestep in timesteps][-1])


def text_work(pipe: Any, request: Request) -> Work:
    """A call's prompts to embeddings: the tokenizer, and every text encoder once, or twice with guidance."""
    import torch

    prompts = [request.prompts[0]] * request.batch
    return torch.no_grad()(lambda: encode(pipe, prompts, 1, request.guided))


def vae_work(pipe: Any, request: Request) -> Work:
    """A call's latents to pixels."""
    import torch

    sample = latents_of(pipe, request, request.batch, pipe.vae.config.latent_channels)
    sample = sample.to(pipe.device, pipe.text_encoder.dtype)
    return torch.no_grad()(lambda: pipe.vae.decode(sample, return_dict=False)[0])


WORKS: dict[str, Callable[[Any, Request], Work]] = {UNET: step_work, TEXT_ENCODER: text_work, VAE_DECODER: vae_work}


def _latent_sides(pipe: Any, request: Request) -> Size:
    height, width = request.size
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def latents_of(pipe: Any, request: Request, batch: int, channels: int) -> torch.Tensor:
    """Latents [batch, channels, height, width] of the request's size and seed, float32 on the CPU."""
    import torch

    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn((batch, channels, *_latent_sides(pipe, request)), generator=generator)


def kind_of(pipe: Any) -> PipelineKind:
    """The pipeline of diffusers that a model is for, by what its UNet takes and whether it has a ControlNet."""
    channels = int(pipe.unet.config.in_channels)
    seen = SEEING[channels][1][0] if channels in SEEING else frozenset[str]()
    return kind_for(channels, seen | {"control"} if getattr(pipe, "controlnet", None) is not None else seen)


def as_drawn(pipe: Any) -> Any:
    """The pipeline in the class that its model is for; text-to-image stays as it is, whatever its class.

    But for LatentConsistencyModelPipeline, which takes LCM's scheduler alone: StableDiffusionPipeline draws the same.
    """
    kind = kind_of(pipe)
    stays = kind is TEXT and type(pipe).__name__ not in EMBEDDING
    return pipe if stays else as_pipeline(pipe, kind.of(family_of(pipe)))


def _inputs(kind: PipelineKind, size: Size, steps: int) -> Inputs:
    """The drawn images that a pipeline takes, in the size to draw, and its scales' defaults."""
    images = {name: picture(name, size) for name in sorted(set(kind.images.values()))}
    return with_defaults(Inputs(images=images), kind, steps)


def picture(name: str, size: Size) -> Image:
    """The drawn input of a name.

    `image`: a red disc on a field that goes from blue to yellow; `control`: its outline, white on black, as edge
    detectors give it; both RGB. `mask`: white, which is drawn again, in the middle; mode L.
    """
    from PIL import Image, ImageDraw

    height, width = size
    middle = width // 4, height // 4, width - width // 4 - 1, height - height // 4 - 1
    if name == "mask":
        field = Image.new("L", (width, height), 0)
        ImageDraw.Draw(field).rectangle(middle, fill=255)
    elif name == "control":
        field = Image.new("RGB", (width, height), "black")
        ImageDraw.Draw(field).ellipse(middle, outline="white", width=max(1, min(size) // 64))
    else:
        gradient = Image.linear_gradient("L")
        across, down = gradient.rotate(90).resize((width, height)), gradient.resize((width, height))
        field = Image.merge("RGB", (across, down, across.point(lambda value: 255 - value)))
        ImageDraw.Draw(field).ellipse(middle, fill=(220, 40, 40))
    return field


def inputs_note(name: str, kind: PipelineKind) -> str | None:
    """What a report says of a model's inputs; None for text-to-image."""
    if kind is TEXT:
        return None
    names = {"control": "the outline of a disc for its ControlNet", "image": "a drawn picture", "mask": "a mask"}
    given = " and ".join(names[each] for each in ("image", "mask", "control") if each in kind.images.values())
    return f"{name} was given {given}, the same for every subject"
