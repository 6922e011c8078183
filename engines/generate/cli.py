"""`sdkd generate`: images from a prompt and from images, on engines or eagerly."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.generate.drawing import Request, draw_all, engine_batch, in_batches, metadata
from engines.generate.image_inputs import (
    Inputs,
    as_pipeline,
    check_control,
    check_encoder,
    done_steps,
    find_kind,
    known_config,
    read_inputs,
    resized,
    with_defaults,
)
from engines.generate.loading import Asked, choose_target, drawn_with, image_size, load
from engines.generate.long_prompts import reading
from engines.generate.processes import check_gpus, ended_like_ctrl_c, join, main_progress
from engines.generate.prompts import check_images, image_files, missing, write_metadata
from sdkd.core.conditions import guidance_width
from sdkd.core.console import show
from sdkd.core.contract import check_size, size_multiple
from sdkd.core.numbers import DRAWING, check_number, check_numbers
from sdkd.core.profiles import parse_size
from sdkd.core.text_files import prompt_lines, typed_text
from sdkd.errors import InputError
from sdkd.models.conditioning import family_of
from sdkd.models.generation import Generation, said, warnings
from sdkd.models.kinds import BundleSource
from sdkd.models.replacements import with_vae
from sdkd.models.resolve import resolve
from sdkd.models.schedulers import SCHEDULERS, check_steps, scheduler_class, use_scheduler
from sdkd.models.source import ModelSource
from sdkd.models.step_caching import check_cachable, check_cached, check_interval, few_steps_note


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
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default: what the model was made for, else 25.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="1 or less: no guidance; default: the model's, else 7.5.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the next ones count up.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 512, or height x width as 512x768; default: the model's own.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out of the image.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}, or a diffusers class; default: the model's.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images per call; default: with --prompts what the engine was built for, else 1."),
    ] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="With --prompts: processes, one per GPU.")] = 1,
    image: Annotated[Path | None, typer.Option(help="An image to start from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask of --image: white is repainted.")] = None,
    control: Annotated[Path | None, typer.Option(help="The image that the bundle's ControlNet reads.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --image to change, 0 to 1; default: 0.8, with --mask 1.")
    ] = None,
    control_scale: Annotated[float | None, typer.Option(help="Weight of the ControlNet; default: 1.")] = None,
    image_guidance_scale: Annotated[
        float | None, typer.Option(help="Instruct-pix2pix: how much to keep of --image; default: 1.5.")
    ] = None,
    cache_interval: Annotated[
        int, typer.Option(min=1, help="Step caching: of so many UNet calls one is whole, the others reuse it.")
    ] = 1,
    vae: Annotated[str | None, typer.Option(help="Another VAE for a model, as `sdkd export` takes it.")] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Open the engines in turn.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images that are there.")] = False,
) -> None:
    """Make images from a prompt, and from an image: a bundle runs on its engines, any other model eagerly.

    With --prompts the folder of images fills; the same command goes on where it was interrupted.
    """
    given = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed, "count": count, "batch": batch}
    scales = {"strength": strength, "control_scale": control_scale, "image_guidance_scale": image_guidance_scale}
    check_numbers({**given, **scales, "num_processes": num_processes, "cache_interval": cache_interval}, DRAWING)
    texts = prompt_texts(prompt, prompts)
    check_number("number of images", len(texts) * count, high=DRAWING["count"].high)
    files = (
        output_files(output, prompt, count)
        if prompt is not None
        else image_files(output_folder(output, prompts), len(texts) * count)
    )
    check_images(files, overwrite, [model, vae, image, mask, control, prompts], folder=prompts is not None)
    wanted = None if size is None else drawn_size(size)
    inputs = read_inputs({"image": image, "mask": mask, "control": control}, scales)
    if scheduler is not None:
        scheduler_class(scheduler)
    source = with_vae(resolve(model), vae)
    check_bundle_size(source, wanted)
    asked = steps, guidance_scale, scheduler
    check_inputs(source, target, inputs, asked, negative_prompt, cache_interval)
    wanted_engines: dict[str, Any] = {"control": control is not None, "cache_interval": cache_interval}
    slot = choose_target(source, target, **wanted_engines)
    check_encoder(source, slot, inputs)
    if num_processes > 1:
        start_processes(num_processes, slot, files, prompts, texts)
        return
    state = join(slot)
    with main_progress("load", state) as report:
        report(model, None)
        pipe, used = load(source, slot, **wanted_engines, low_memory=low_memory)
    run = drawn_with(source, asked)
    use_scheduler(pipe, run.scheduler)
    check_steps(pipe.scheduler, run.steps)
    height, width = wanted or image_size(pipe)
    check_size(height, width, size_multiple(pipe.unet.config, pipe.vae.config))
    kind = find_kind(model, pipe.unet.config, inputs, negative_prompt)
    inputs, lines = resized(with_defaults(inputs, kind, run.steps), height, width)
    unwanted = negative_prompt and typed_text(negative_prompt)
    parts, long = reading(pipe, [*texts, unwanted or ""], height, width)
    numbers = run.steps, run.guidance_scale, seed, len(files)
    request = Request(texts, unwanted, height, width, *numbers, kind, inputs, parts, cache_interval)
    for line in (*how_it_runs(source, run, unwanted, cache_interval), *lines, *long) if state.is_main_process else ():
        show(line)
    start = time.perf_counter()
    size_of_batch = batch or (engine_batch(pipe, request.settings).max if prompts is not None else 1)
    drawn = carry_out(
        as_pipeline(pipe, kind.of(family_of(pipe))), request, files, (named(model, vae), used), state, size_of_batch,
        overwrite=overwrite or prompt is not None, folder=prompts is not None,
    )  # fmt: skip
    if state.is_main_process:
        tell(request, files if prompt is not None else [files[0].parent], used, drawn, time.perf_counter() - start)
    if state.num_processes > 1:
        state.destroy_process_group()  # or NCCL complains when the process ends


def named(model: str, vae: str | None) -> str:
    """What an image says that it was made by."""
    return model if vae is None else f"{model} --vae {vae}"


def tell(request: Request, places: Sequence[Path], target: str, drawn: int, seconds: float) -> None:
    """Say where the images are and how long they took."""
    for place in places:
        show(str(place))
    kept = f", {request.count - drawn} were there" if drawn < request.count else ""
    plural = "" if drawn == 1 else "s"
    show(
        f"{request.width}x{request.height} px (width x height), {request.steps} steps, target {target}: "
        f"{seconds:.2f} s for {drawn} image{plural}{kept}"
    )


def carry_out(
    pipe: Any,
    request: Request,
    files: Sequence[Path],
    made_by: tuple[str, str],
    state: Any,
    batch: int,
    *,
    overwrite: bool,
    folder: bool,
) -> int:
    """Draw and write every image that is not there yet, this process's share; returns how many all of them drew.

    `made_by`: model and target. A `folder` gets its metadata.jsonl from the main process, also when it is interrupted.
    """
    settings = [metadata(request, index, *made_by, pipe) for index in range(len(files))]
    indices = list(range(len(files))) if overwrite else missing(files, settings)
    state.wait_for_everyone()  # all have looked before the first one writes: they must agree on what is missing
    batches = in_batches(indices, batch)[state.process_index :: state.num_processes]
    at_least = min(batch, engine_batch(pipe, request.settings).min)
    try:
        with ended_like_ctrl_c(state), main_progress("generate", state) as report:
            draw_all(pipe, request, files, settings, batches, report, at_least=at_least)
        state.wait_for_everyone()
    finally:
        if folder and state.is_main_process:
            write_metadata(files, [request.prompt(index) for index in range(len(files))])
    return len(indices)


def start_processes(
    processes: int, target: str, files: Sequence[Path], prompts: Path | None, texts: Sequence[str]
) -> None:
    """Run this command in several processes; InputError without a file of prompts, TrainingError when one fails."""
    from sdkd.core.torchrun import relaunch

    if prompts is None or prompts.is_fifo():  # a pipe is read once
        raise InputError(f"{processes} processes share a file of prompts: give --prompts FILE, or leave out the number")
    check_gpus(target, processes)
    try:
        relaunch(processes)
    finally:  # processes that were ended could not do this
        write_metadata(files, [texts[index % len(texts)] for index in range(len(files))])


def how_it_runs(source: ModelSource, run: Generation, unwanted: str | None, cache_interval: int = 1) -> list[str]:
    """What the model was made for, and what is poor about drawing with other settings; a line each."""
    made, embedded = source.generation, guidance_width(source.unet_config) is not None
    line = said(made, run)
    poor = [*warnings(made, run, embedded=embedded, negative=unwanted), *few_steps_note(run.steps, cache_interval)]
    return [*([line] if line else []), *poor]


def check_inputs(
    source: ModelSource,
    target: str | None,
    inputs: Inputs,
    asked: Asked,
    negative_prompt: str | None,
    cache_interval: int = 1,
) -> None:
    """InputError, before anything is loaded, when a model cannot draw from what is given beside the prompt.

    Also when it has fewer steps than are to be cached; what `check_cached` and `check_cachable` raise.
    """
    check_control(source, target, inputs)
    config, steps = known_config(source), drawn_with(source, asked).steps
    if config is not None:
        inputs = with_defaults(inputs, find_kind(source.name, config, inputs, negative_prompt), steps)
    check_interval(cache_interval, done_steps(inputs.scales, steps) if cache_interval > 1 else None)
    if cache_interval > 1 and isinstance(source, BundleSource) and target != "eager":
        check_cached(source.bundle)
    elif cache_interval > 1:
        check_cachable(config or {}, source.generation)


def prompt_texts(prompt: str | None, prompts: Path | None) -> tuple[str, ...]:
    """What is asked for by one of both; InputError when it is both or none."""
    if (prompt is None) == (prompts is None):
        raise InputError("give a prompt, or --prompts with a file of prompts, one of the two")
    return (typed_text(prompt),) if prompt is not None else prompt_lines(prompts or Path())


def output_folder(output: Path | None, prompts: Path | None) -> Path:
    """Where the images of a file of prompts go."""
    return output or Path("artifacts") / (prompts or Path("images")).stem


def output_files(output: Path | None, prompt: str, count: int) -> list[Path]:
    """Where the images go: one file, or the name numbered from 1; InputError unless it is a .png."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "image"
    first = output or Path("artifacts") / f"{slug}.png"
    if first.suffix.lower() != ".png":
        raise InputError(f"output {str(first)!r} is not a .png file: name one, images carry their settings as PNG text")
    return [first] if count == 1 else [first.with_stem(f"{first.stem}-{index + 1}") for index in range(count)]


def drawn_size(text: str) -> tuple[int, int]:
    """Read `512` or `512x768` as (height, width) in pixels of an image; InputError, also for too large ones."""
    height, width = parse_size(text)
    check_numbers({"height": height, "width": width}, DRAWING)
    return height, width


def check_bundle_size(source: ModelSource, size: tuple[int, int] | None) -> None:
    """InputError, before anything is loaded, when a bundle's UNet cannot have that size."""
    if size is not None and isinstance(source, BundleSource):
        check_size(*size, size_multiple(source.unet_config, source.config("vae")))
