"""`sdkd cache`: posteriors and text embeddings of captioned images on disk, by one process or several."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkd.core.child import BackgroundJob, ChildError
from sdkd.core.console import Progress, progress, quiet, show, show_json, within
from sdkd.core.files import check_free, lock, staged_folder
from sdkd.core.marks import CACHE, proves
from sdkd.core.outputs import check_place
from sdkd.core.replace import sweep_inside
from sdkd.distill.data.opening import FirstImages, open_images
from sdkd.distill.data.rows import CAPTION_COLUMNS, CaptionedImages, check_columns, split_columns
from sdkd.errors import InputError, InterruptedRunError, TrainingError
from sdkd.models.resolve import load_eager, resolve

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_TAIL = 2000  # characters of a process's last output that its error message shows


@dataclass(frozen=True)
class CacheJob:
    """What to encode with what; fields are the command's options."""

    model: str
    data: str
    output: str
    resolution: int | None = None  # pixels; None: the model's own
    precision: str = "bf16"
    device: str = "auto"
    image_column: str | None = None
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS
    max_images: int | None = None
    shard_images: int = 1024
    workers: int = 4
    text: bool = True
    flip: bool = False


_DEFAULT = CacheJob("", "", "")


def cache(
    model: Annotated[str, typer.Argument(help="Whose VAE and text encoder: a folder, hub id, .safetensors or demo.")],
    data: Annotated[str, typer.Argument(help="Folder, tar shards, parquet, hub id, or demo.")],
    output: Annotated[Path, typer.Argument(help="Folder for the latents.")],
    resolution: Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp32 or fp16 (CUDA).")] = _DEFAULT.precision,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _DEFAULT.device,
    num_processes: Annotated[int, typer.Option(help="Processes, each on a GPU of its own where there are any.")] = 1,
    image_column: Annotated[str | None, typer.Option(help="Column of the image. [default: found]")] = None,
    caption_columns: Annotated[str, typer.Option(help="Columns; the first one found.")] = ",".join(CAPTION_COLUMNS),
    max_images: Annotated[int | None, typer.Option(help="Use the first so many. [default: all]")] = None,
    shard_images: Annotated[int, typer.Option(help="Images per file.")] = _DEFAULT.shard_images,
    workers: Annotated[int, typer.Option(help="Threads that read images, per process.")] = _DEFAULT.workers,
    text: Annotated[bool, typer.Option(help="Store text embeddings too.")] = True,
    flip: Annotated[bool, typer.Option("--flip", help="Store mirrored images, too: for runs with --flip.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a cache.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Encode images and captions once, for many runs: give OUTPUT to `sdkd distill --data`.

    Training from a cache equals training from the images of the same precision to the last bit. Recipes that distill
    mirror every other image: make their cache with --flip, which takes twice the time and room. An interrupted run
    keeps its complete shards; the same command goes on from there.
    """
    job = CacheJob(
        model, data, str(output), resolution=resolution, precision=precision, device=device, image_column=image_column,
        caption_columns=split_columns(caption_columns),
        max_images=max_images, shard_images=shard_images, workers=workers, text=text, flip=flip,
    )  # fmt: skip
    with progress("cache") as report:
        summary = run(job, num_processes, overwrite=overwrite, report=report)
    if json:
        show_json(summary)
        return
    for message in summary["unreadable"].values():
        show(f"skipped: {message}")
    if cut := summary["cut"]:
        show(f"{cut} captions have more tokens than the text encoder reads, and were cut there")
    show(
        f"{summary['images']} images at {summary['resolution']} pixels in {summary['output']}. "
        f"Train from them: sdkd distill --teacher {shlex.quote(job.model)} --student STUDENT "
        f"--data {shlex.quote(summary['output'])} --output RUN"
    )


def run(job: CacheJob, processes: int = 1, *, overwrite: bool = False, report: Progress = quiet) -> dict[str, Any]:
    """What the command does; returns its summary. Complete shards stay when it fails, nothing else does."""
    if processes < 1:
        raise InputError(f"num_processes {processes} is not positive: give 1 or more")
    check_columns(job.caption_columns)
    resolve(job.model)
    out, inputs = Path(job.output), (job.model, job.data)
    if overwrite or not proves(out, CACHE):
        check_free(out, overwrite, inputs)
    else:
        check_place(out, inputs, filled=True)
    with lock(out):
        sweep_inside(out)
        index = _replace(job, processes, report) if overwrite else _fill(job, processes, report)
    index["cut"] = sum(record.get("cut", 0) for record in index["texts"])
    names = ("images", "resolution", "precision", "flip", "cut", "unreadable")
    return {"output": job.output, "model": job.model, "data": job.data, **{name: index[name] for name in names}}


def _replace(job: CacheJob, processes: int, report: Progress) -> dict[str, Any]:
    """A new cache in the place of what is there, which stays until the new one is complete."""
    with staged_folder(Path(job.output)) as partial:
        return _run(replace(job, output=str(partial)), processes, report)


def _fill(job: CacheJob, processes: int, report: Progress) -> dict[str, Any]:
    """A cache in its folder, shard by shard."""
    out = Path(job.output)
    try:
        return _run(job, processes, report)
    except BaseException as error:
        kept = _tidy(out)
        if isinstance(error, KeyboardInterrupt) and kept:
            raise InterruptedRunError(
                f"interrupted: {kept} complete shards are kept in {out}, the same command goes on from them"
            ) from None
        raise


def _run(job: CacheJob, processes: int, report: Progress) -> dict[str, Any]:
    from sdkd.distill.data.cache import cache_settings, prepare, write_cache

    report("loading the model", None)
    pipe, images, settings, how = _opened(job, 0)
    if processes > 1 and prepare(Path(job.output), cache_settings(pipe, images, **settings)) is None:
        _in_processes(job, processes, within(report, 0.0, 0.9))
    return write_cache(pipe, images, Path(job.output), **settings, **how, progress=report) or {}


def _opened(
    job: CacheJob, rank: int
) -> tuple[StableDiffusionPipeline, CaptionedImages, dict[str, Any], dict[str, Any]]:
    """Pipeline, images, and for `write_cache` what its content depends on, and how a process makes it."""
    from sdkd.distill.data.latents import training_size
    from sdkd.distill.training.setup import pick_device

    device = pick_device(job.device, job.precision, rank)
    images = open_images(job.data, image_column=job.image_column, caption_columns=job.caption_columns)
    if job.max_images is not None:
        if job.max_images < 1:
            raise InputError(f"max_images {job.max_images} is not positive: give 1 or more")
        images = FirstImages(images, job.max_images)
    pipe = load_eager(job.model)
    settings = {name: getattr(job, name) for name in ("precision", "shard_images", "text", "flip")}
    settings["size"] = training_size(pipe, job.resolution)
    return pipe, images, settings, {"workers": job.workers, "device": device}


def _tidy(out: Path) -> int:
    """Remove half-written files, and the folder when no shard is complete; returns how many are."""
    from sdkd.distill.data.disk_cache import INDEX, SETTINGS

    if not proves(out, CACHE):
        return 0
    for path in out.glob(".*.partial"):
        path.unlink(missing_ok=True)
    complete = len(list(out.glob("*-*.json")))
    if not complete and not (out / INDEX).exists() and (out / SETTINGS).exists():
        for path in (*out.glob("latents-*.safetensors"), out / SETTINGS):
            path.unlink()
        with contextlib.suppress(OSError):
            out.rmdir()
    return complete


def _in_processes(job: CacheJob, processes: int, report: Progress) -> None:
    """Write all shards by several processes; the first failure ends them all, and so does Ctrl-C."""
    done = [0.0] * processes

    def follow(rank: int, child: BackgroundJob) -> None:
        def part(text: str, fraction: float | None) -> None:
            done[rank] = fraction or done[rank]
            report(f"{text} (process {rank + 1} of {processes})", sum(done) / processes)

        try:
            child.result(part)
        except ChildError as error:
            raise TrainingError(_failed(rank, error)) from error

    with ThreadPoolExecutor(processes) as threads, contextlib.ExitStack() as stack:
        shares = [{"job": asdict(job), "rank": rank, "world": processes} for rank in range(processes)]
        children = [stack.enter_context(BackgroundJob(f"{__name__}:write_share", share)) for share in shares]
        for followed in as_completed([threads.submit(follow, *one) for one in enumerate(children)]):
            followed.result()


def _failed(rank: int, error: ChildError) -> str:
    """Why a process of several failed, and what to do."""
    if not error.ended_by:
        return f"a process of the cache failed: {error}"
    said = "\n".join(error.tail)[-_TAIL:]
    return f"process {rank + 1} of the cache ended by {error.ended_by}: run again, it goes on; it said: {said}"


def write_share(job: Mapping[str, Any], rank: int, world: int, progress: Progress = quiet) -> None:
    """Write the shards of process `rank` of `world`; raises as `run`."""
    from sdkd.distill.data.cache import write_cache

    own = CacheJob(**{**job, "caption_columns": tuple(job["caption_columns"])})
    pipe, images, settings, how = _opened(own, rank)
    write_cache(pipe, images, Path(own.output), **settings, **how, rank=rank, world=world, progress=progress)
