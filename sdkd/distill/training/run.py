"""A whole run as the commands do it: model and data by name, a folder that fills, the finished result in it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.conditions import guidance_width
from sdkd.core.console import Progress, quiet
from sdkd.core.files import read_json, staged_folder, write_bytes, write_json
from sdkd.core.interrupts import is_main
from sdkd.distill.data.opening import open_images_or_cache
from sdkd.distill.training.card import Origin, about, model_card, named
from sdkd.distill.training.config import SAME, TrainConfig
from sdkd.distill.training.run_folder import carry_over, check_output, find_checkpoint, is_whole, run_folder
from sdkd.errors import InputError
from sdkd.models.checkpoint import BASE, is_checkpoint, load_own, unet_folder
from sdkd.models.diffusers_folder import provenance
from sdkd.models.generation import GENERATION, noted

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from sdkd.distill.data.disk_cache import DiskCache
    from sdkd.distill.data.latents import Latents
    from sdkd.distill.data.rows import CaptionedImages
    from sdkd.distill.training.loop import TrainResult
    from sdkd.distill.training.rounding import Start
    from sdkd.models.resolve import ModelSource


@dataclass(frozen=True)
class Job:
    """What to train on what: `model` is the teacher's name for distillation, else the model to train."""

    model: str
    data: str
    output: Path
    config: TrainConfig
    resume: str = "never"  # auto, never, or a checkpoint's folder
    overwrite: bool = False
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    init: str | None = None  # a model or checkpoint whose UNet, or LoRA, training starts from
    teacher: str | None = None  # of a LoRA for few steps, where it is not the model itself
    command: str = field(default_factory=lambda: shlex.join(["sdkd", *sys.argv[1:]]))  # as typed, for the card


def run(job: Job, report: Progress = quiet) -> dict[str, Any]:
    """Train and write the result into `job.output`; returns a summary.

    An interrupted or failed run keeps the checkpoints that it saved, and leaves nothing behind when it saved none.
    Raises what `sdkd.distill.train` raises, OutputExistsError, and InterruptedRunError when Ctrl-C came after a
    checkpoint.
    """
    from sdkd.distill.data.latents import training_size
    from sdkd.distill.training.loop import check_trackers, train
    from sdkd.distill.training.rounding import Start
    from sdkd.distill.training.setup import check_views
    from sdkd.models.resolve import load_component, load_eager, resolve

    checkpoint = find_checkpoint(job.output, job.resume)
    if is_main():
        inputs = (job.model, job.data, job.init, job.teacher)
        check_output(job.output, job.resume, job.overwrite, inputs, goes_on=checkpoint is not None)
    source, data = resolve(job.model), open_images_or_cache(job.data, job.image_column, job.caption_columns)
    check_views(data, job.config)
    check_trackers(job.config)
    if not source.here:
        report("fetching the model", None)
    check_sources(job, source)
    origin = _origin(job, source)
    if checkpoint and _is_finished(job, checkpoint, origin, data):
        return _finished(job, source.name, len(data))
    adapter = _adapter(job)
    with run_folder(job.output, checkpoint, job.resume, job.overwrite, job.config) as folder:
        report("loading the model", 0.0)
        pipe = load_eager(source)
        unet, counts = _unet(pipe, job)
        check_cache(data, pipe, job.config)
        done = train(
            pipe, unet, data, job.config,
            progress=report, folder=folder, resume=checkpoint, origin=origin, adapter=adapter,
            teacher=load_component(job.teacher, "unet") if job.teacher else None,
        )  # fmt: skip
        summary = _summary(job, source.name, done, counts) | {"notes": list(source.notes)}
        if done.main_process:
            facts = about(
                job.config, Origin(source.name, job.teacher, origin.generation), done.history[-1],
                data=job.data, images=done.images, random_weights=source.random_weights,
            )  # fmt: skip
            size = int(getattr(data, "size", 0)) or training_size(pipe, job.config.resolution)
            card = model_card(job.config, facts, source.family, size=size, counts=counts, command=job.command)
            _write(job, folder, pipe, done, facts, card, Start(pipe, unet, data, job.config, origin, folder, report))
    return summary


def check_sources(job: Job, source: ModelSource) -> None:
    """InputError or ModelError, before weights are read, when teacher, model and what training starts from do not go
    together.
    """
    from sdkd.distill.training.setup import check_configs
    from sdkd.models.resolve import load_rest, resolve
    from sdkd.models.schedulers import noise_schedule

    kind = job.config.kind
    if job.teacher and not (kind.lora and kind.consistency):
        raise InputError(f"teacher {job.teacher!r} is for a LoRA of --objective consistency: leave it out")
    named = {"--teacher": job.teacher, "--init": None if kind.lora else job.init}
    # A checkpoint needs no other parts than its UNet here, and those may be gone.
    whole = {option: name for option, name in named.items() if name and not is_checkpoint(Path(name).expanduser())}
    others = {option: resolve(name) for option, name in whole.items()}
    if kind.consistency:
        for asked in (source, *(other for option, other in others.items() if option == "--teacher")):
            if asked.generation is not None and asked.generation.few_steps:
                raise InputError(
                    f"model {asked.name!r} draws in few steps already, and consistency distillation needs a teacher "
                    "that takes many: give the model that it was made from"
                )
    configs = {option: other.unet_config for option, other in others.items()}
    if named["--init"] and "--init" not in others:
        configs["--init"] = read_json(unet_folder(Path(named["--init"]).expanduser()) / "config.json")
    start = _with_guidance(configs.get("--init"), job.config)
    what = f"--init {job.init!r}"
    check_configs(job.config, source.unet_config, source.config("vae"), start, configs.get("--teacher"), what)
    own = noise_schedule(load_rest(source).scheduler) if others else {}
    for option, other in others.items():
        found = noise_schedule(load_rest(other).scheduler)
        if wrong := next((key for key in own if own[key] != found[key]), None):
            raise InputError(
                f"{option} {other.name!r} was trained with {wrong} {found[wrong]!r}, {source.name!r} with "
                f"{own[wrong]!r}: teacher and student must have one noise schedule and prediction type"
            )


def _with_guidance(unet: Mapping[str, Any] | None, config: TrainConfig) -> Mapping[str, Any] | None:
    """The config of a UNet to start from, with the guidance embedding that it gets where it has none."""
    if unet is None or not config.guidance_embedding or guidance_width(unet) is not None:
        return unet
    return {**unet, "time_cond_proj_dim": config.guidance_embedding}


def _absolute(source: ModelSource) -> str:
    """A model's name that means the same from another folder."""
    return source.name if source.kind in ("demo", "random", "hub") else str(Path(source.name).expanduser().absolute())


def _origin(job: Job, source: ModelSource) -> Origin:
    """What the run starts from, by names that mean the same from another folder."""
    from sdkd.models.resolve import resolve

    teacher = None if job.teacher is None else _absolute(resolve(job.teacher))
    if job.init is None or job.config.objective != "finetune":
        return Origin(_absolute(source), teacher, source.generation)
    path = Path(job.init).expanduser()  # a checkpoint's other parts may be gone
    made = noted(provenance(path), f"checkpoint {job.init!r}") if is_checkpoint(path) else resolve(job.init).generation
    return Origin(_absolute(source), teacher, made)


def _is_finished(job: Job, checkpoint: Path, origin: Origin, data: CaptionedImages | Latents) -> bool:
    """Whether there is nothing left to do; InputError when the run that is finished was another.

    Models of other names are loaded and compared, like those of a run that goes on.
    """
    from sdkd.distill.data.digests import data_digest
    from sdkd.distill.training.checkpoint import UNetRecord, check_settings
    from sdkd.distill.training.record import read_record, step_of

    if not is_whole(checkpoint.parent) or step_of(checkpoint) != job.config.steps:
        return False
    record = read_record(checkpoint, UNetRecord)
    check_settings(checkpoint, record, job.config, int(os.environ.get("WORLD_SIZE", "1")))
    then, now = provenance(checkpoint), {BASE: origin.model, **named(job.config, origin.model, origin.teacher)}
    same = all(then.get(name) == now.get(name) for name in (BASE, "teacher"))
    return same and record["digests"].get("data") == data_digest(data)


def _finished(job: Job, model: str, images: int) -> dict[str, Any]:
    from sdkd.distill.training.log import LOG, read_log
    from sdkd.distill.training.loop import TrainResult

    history = read_log(job.output / LOG)
    note = f"this run of {job.config.steps} steps was finished before: ask for more --steps to go on"
    done = TrainResult(None, history, 0.0, job.config.steps, images, {}, notes=(note,))
    return _summary(job, model, done, {}) | {"notes": []}


def _adapter(job: Job) -> dict[str, torch.Tensor] | None:
    """The weights of the LoRA to start from; InputError when its rank or alpha are not the run's."""
    if not job.config.kind.lora or job.init is None:
        return None
    from sdkd.students.lora_file import read_lora

    path, config = Path(job.init), job.config
    state, made = read_lora(path / "lora" if (path / "lora").is_dir() else path)
    now = {"r": config.lora_rank, "lora_alpha": config.lora_alpha or config.lora_rank}
    if other := [f"{key} {made[f'unet.{key}']}" for key in now if made.get(f"unet.{key}", now[key]) != now[key]]:
        raise InputError(f"init {job.init!r} has {' and '.join(other)}: give --lora-rank and --lora-alpha to match")
    return state


def check_cache(data: CaptionedImages | DiskCache, pipe: StableDiffusionPipeline, config: TrainConfig) -> None:
    """InputError when latents were made by another VAE or text encoder, or for another resolution."""
    from sdkd.distill.data.disk_cache import DiskCache

    if not isinstance(data, DiskCache):
        return
    data.check(pipe)
    data.check_resolution(config.resolution)


def _unet(pipe: StableDiffusionPipeline, job: Job) -> tuple[Any, dict[str, int]]:
    """The UNet to train, and parameter counts of it and its teacher."""
    import torch

    from sdkd.core.contract import torch_dtype
    from sdkd.students.blocks import build_student, copy_unet, count_parameters

    config = job.config
    whole = count_parameters(pipe.unet.config)
    if config.kind.lora or (config.objective == "finetune" and job.init is None):
        return pipe.unet, {"parameters": whole}
    if job.init is not None:
        student = _unet_of(job.init)
    else:
        student = copy_unet(pipe.unet) if config.student == SAME else build_student(pipe.unet, config.student)
    if config.objective == "finetune":
        return student, {"parameters": count_parameters(student.config)}
    if config.guidance_embedding and guidance_width(student.config) is None:
        student = copy_unet(student, time_cond_proj_dim=config.guidance_embedding)
    torch.nn.Module.to(pipe.unet, torch_dtype(config.precision))  # now the student has its weights: no copy is needed
    return student, {"parameters": count_parameters(student.config), "teacher_parameters": whole}


def _unet_of(model: str) -> Any:
    """The UNet of a model, or of a checkpoint, which needs no other parts for it."""
    import torch

    from sdkd.models.resolve import load_component

    path = Path(model).expanduser()
    return load_own(path, torch.float32) if is_checkpoint(path) else load_component(model, "unet")


def _write(
    job: Job,
    folder: Path,
    pipe: StableDiffusionPipeline,
    done: TrainResult,
    facts: Mapping[str, Any],
    card: str,
    start: Start,
) -> None:
    """The finished result, with all that the run's folder holds, in the place of the output, in one step."""
    from sdkd.distill.training.drawing import result_scheduler
    from sdkd.distill.training.rounding import FILE, final_calibration
    from sdkd.models.diffusers_folder import PROVENANCE, component_digest, write_pipeline

    with staged_folder(job.output) as partial:
        if job.config.kind.lora:
            from sdkd.distill.training.lora import save_lora

            save_lora(done.unet, partial, {key: facts[key] for key in (GENERATION,) if key in facts})
            write_json(partial / PROVENANCE, dict(facts))
            write_bytes(partial / "README.md", card.encode())
        else:
            few = job.config.kind.consistency
            scheduler = result_scheduler(pipe.scheduler, job.config, None) if few else None
            unet: Any = done.unet.cpu()
            write_pipeline(pipe, partial, unet=unet, scheduler=scheduler, about=dict(facts), readme=card)
            if done.calibration is not None:
                digest = component_digest(partial / "unet")
                final_calibration(start, done.calibration, unet, digest, folder).save(partial / "unet" / FILE)
        carry_over(folder, partial)


def _summary(job: Job, model: str, done: TrainResult, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "output": str(job.output),
        "objective": job.config.objective,
        **named(job.config, model, job.teacher),
        **{name.replace("parameters", "unet_parameters"): value for name, value in counts.items()},
        "steps": done.steps,
        "images": done.images,
        "unreadable": list(done.unreadable.values()),
        "seconds": done.seconds,
        "remarks": list(done.notes),
        "first": done.history[0] if done.history else {},
        "last": done.history[-1] if done.history else {},
    }
