"""`sdkd generate`: images from a prompt, on engines or eagerly."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from engines.prompts import image_files, is_drawn, read_prompts, write_metadata
from sdkd.bundle import MANIFEST, Bundle
from sdkd.console import Progress, progress, show
from sdkd.contract import check_size, size_multiple, vae_scale
from sdkd.errors import InputError
from sdkd.files import check_free, write_bytes
from sdkd.profiles import ShapeRanges
from sdkd.targets import check_target

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "dpm-sde": "DPMSolverSDEScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True)
class Request:
    """What to draw; sizes in pixels, image i uses seed + i and the prompts in turn."""

    prompts: tuple[str, ...]
    negative_prompt: str | None
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    count: int

    def prompt(self, index: int) -> str:
        """The prompt of an image."""
        return self.prompts[index % len(self.prompts)]


def generate(
    model: Annotated[str, typer.Argument(help="A bundle (runs on its engines) or any other model (runs eagerly).")],
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file with one prompt a line; --output is then a folder, which can be gone on with."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png file, or with --prompts a folder. [default: in artifacts/]"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="A target of the bundle, or `eager`; default: the best that runs here.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less turns guidance off.")] = 7.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the next ones count up.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 512, or height x width as 512x768; default: the model's own.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out of the image.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}, or a diffusers class; default: the model's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images that are there.")] = False,
) -> None:
    """Make images from a prompt: a bundle runs on its engines, any other model eagerly."""
    texts = prompt_texts(prompt, prompts)
    files = (
        output_files(output, prompt, count)
        if prompt
        else image_files(output_folder(output, prompts), len(texts) * count)
    )
    for file in files if prompt else ():
        check_free(file, overwrite)
    wanted = None if size is None else parse_size(size)
    check_bundle_size(model, wanted)
    with progress("load") as report:
        report(model, None)
        pipe, used = load(model, target)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    height, width = wanted or default_size(pipe)
    check_size(height, width, size_multiple(pipe.unet.config, pipe.vae.config))
    request = Request(texts, negative_prompt, height, width, steps, guidance_scale, seed, len(files))
    start = time.perf_counter()
    try:
        drawn = draw_all(pipe, request, files, model, used, overwrite=overwrite or bool(prompt))
    finally:
        if prompts is not None:
            write_metadata(files, [request.prompt(index) for index in range(len(files))])
    seconds = time.perf_counter() - start
    for place in files if prompt else [files[0].parent]:
        show(escape(str(place)))
    kept = f", {len(files) - drawn} were there" if drawn < len(files) else ""
    plural = "" if drawn == 1 else "s"
    show(
        f"{width}x{height} px (width x height), {steps} steps, target {used}: "
        f"{seconds:.2f} s for {drawn} image{plural}{kept}"
    )


def prompt_texts(prompt: str | None, prompts: Path | None) -> tuple[str, ...]:
    """What is asked for by one of both; InputError when it is both or none."""
    if (prompt is None) == (prompts is None):
        raise InputError("give a prompt, or --prompts with a file of prompts, one of the two")
    return (prompt,) if prompt is not None else read_prompts(prompts or Path())


def output_folder(output: Path | None, prompts: Path | None) -> Path:
    """Where the images of a file of prompts go."""
    return output or Path("artifacts") / (prompts or Path("images")).stem


def draw_all(pipe: Any, request: Request, files: Sequence[Path], model: str, target: str, *, overwrite: bool) -> int:
    """Draw and write every image that is not there yet; returns how many were drawn."""
    drawn = 0
    with progress("generate") as report:
        for index, file in enumerate(files):
            settings = metadata(request, index, model, target, pipe)
            if overwrite or not is_drawn(file, settings):
                write_bytes(file, encode_png(draw(pipe, request, index, report), settings))
                drawn += 1
    return drawn


def output_files(output: Path | None, prompt: str, count: int) -> list[Path]:
    """Where the images go: one file, or the name numbered from 1; InputError unless it is a .png."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "image"
    first = output or Path("artifacts") / f"{slug}.png"
    if first.suffix.lower() != ".png":
        raise InputError(f"output {str(first)!r} is not a .png file: name one, images carry their settings as PNG text")
    return [first] if count == 1 else [first.with_stem(f"{first.stem}-{index + 1}") for index in range(count)]


def parse_size(text: str) -> tuple[int, int]:
    """Read `512` or `512x768` as (height, width) in pixels."""
    if not re.fullmatch(r"\d+(x\d+)?", text.strip()):
        raise InputError(f"size {text!r} is not understood: give pixels as 512, or height x width as 512x768")
    numbers = [int(part) for part in text.strip().split("x")]
    return numbers[0], numbers[-1]


def check_bundle_size(model: str, size: tuple[int, int] | None) -> None:
    """InputError, before anything is loaded, when a bundle's UNet cannot have that size."""
    if size is not None and (Path(model).expanduser() / MANIFEST).is_file():
        bundle = Bundle.open(Path(model).expanduser())
        check_size(*size, size_multiple(bundle.config("unet"), bundle.config("vae_decoder")))


def load(model: str, target: str | None) -> tuple[Any, str]:
    """The pipeline and the target that it runs on; InputError when a target is asked for without a bundle."""
    path = Path(model).expanduser()
    if target not in (None, "eager"):
        check_target(target)
    if target == "eager" or not (path / MANIFEST).is_file():
        from sdkd.models import load_eager, resolve

        resolve(model)
        if target not in (None, "eager"):
            raise InputError(
                f"model {model!r} is not a bundle, so it has no {target} engine: build one with: "
                f"sdkd build-engine {model} --target {target} --output artifacts/bundle"
            )
        return load_eager(model), "eager"
    from engines.pipeline import best_slot, load_pipeline

    bundle = Bundle.open(path)
    slot = target or best_slot(bundle)
    return load_pipeline(bundle, slot, controlnet=False), slot


def set_scheduler(pipe: Any, name: str) -> None:
    """Swap the scheduler for one of SCHEDULERS or a diffusers class, same noise schedule; InputError if unknown."""
    import diffusers

    kind = SCHEDULERS.get(name.lower(), name)
    found = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    if found is None or not hasattr(found, "from_config"):
        raise InputError(f"scheduler {name!r} is unknown: choose one of {', '.join(SCHEDULERS)}, or a diffusers class")
    pipe.scheduler = found.from_config(pipe.scheduler.config)


def default_size(pipe: Any) -> tuple[int, int]:
    """The model's native height and width, or the engine's best where it was not built for those; pixels."""
    native = pipe.unet.config.sample_size
    scale = vae_scale(pipe.vae.config)
    height, width = (native * scale,) * 2 if isinstance(native, int) else (native[0] * scale, native[1] * scale)
    session = getattr(pipe.unet, "session", None)
    if session is None:
        return height, width
    ranges: ShapeRanges = session.ranges
    return (
        (height, width) if height in ranges.height and width in ranges.width else (ranges.height.opt, ranges.width.opt)
    )


def draw(pipe: Any, request: Request, index: int, report: Progress) -> Image:
    """One image of a request, the same whatever the count."""
    import torch

    def on_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        done = (index + min(1.0, (step + 1) / request.steps)) / request.count
        report(f"image {index + 1} of {request.count}", min(done, 0.99))
        return tensors

    pipe.set_progress_bar_config(disable=True)
    images: list[Image] = pipe(
        request.prompt(index),
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed + index),
        callback_on_step_end=on_step,
    ).images
    return images[0]


def metadata(request: Request, index: int, model: str, target: str, pipe: Any) -> dict[str, str]:
    """What a PNG says about itself, enough to make it again."""
    values = {
        "prompt": request.prompt(index),
        "negative_prompt": request.negative_prompt,
        "seed": request.seed + index,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "size": f"{request.height}x{request.width}",
        "scheduler": type(pipe.scheduler).__name__,
        "model": model,
        "target": target,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def encode_png(image: Image, text: dict[str, str]) -> bytes:
    """PNG bytes with text fields (UTF-8)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
