"""`sdkd distill`: train a student from its teacher and write its pipeline."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.console import Progress, progress, quiet, show, show_json, table
from sdkd.distill.card import Origin, about, model_card
from sdkd.distill.config import DistillConfig
from sdkd.distill.data import open_images
from sdkd.files import check_free, new_folder
from sdkd.models import load_eager, resolve, write_pipeline
from sdkd.students import build_student, count_parameters

LOG = "training.jsonl"
_DEFAULT = DistillConfig()


def distill(
    teacher: Annotated[str, typer.Option("--teacher", help="A diffusers folder, hub id, .safetensors or demo.")],
    data: Annotated[str, typer.Option("--data", help="A folder of captioned images, or demo.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the student's pipeline.")],
    student: Annotated[str, typer.Option(help="small, tiny, bk-base, bk-small or bk-tiny.")] = _DEFAULT.student,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = _DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = _DEFAULT.batch_size,
    accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = _DEFAULT.accumulation,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = _DEFAULT.learning_rate,
    schedule: Annotated[str, typer.Option(help="cosine or constant.")] = _DEFAULT.schedule,
    warmup: Annotated[int, typer.Option(help="Steps of rising learning rate.")] = _DEFAULT.warmup,
    task_weight: Annotated[float | None, typer.Option(help="[default: the student's]")] = None,
    output_weight: Annotated[float | None, typer.Option(help="[default: the student's]")] = None,
    feature_weight: Annotated[float | None, typer.Option(help="[default: the student's]")] = None,
    pairs: Annotated[str | None, typer.Option(help="segmind or bk-sdm. [default: the student's]")] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Gradient clipping; 0: off.")] = _DEFAULT.max_grad_norm,
    ema: Annotated[float, typer.Option(help="Decay of averaged weights; 0: off.")] = _DEFAULT.ema,
    caption_dropout: Annotated[float, typer.Option(help="Share of empty captions.")] = _DEFAULT.caption_dropout,
    max_images: Annotated[int | None, typer.Option(help="Use the first so many. [default: all]")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels. [default: the teacher's]")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (CUDA).")] = _DEFAULT.precision,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _DEFAULT.device,
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = _DEFAULT.seed,
    log_every: Annotated[int, typer.Option(help="Steps between records of training.jsonl.")] = _DEFAULT.log_every,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train a student from its teacher: task loss, output KD and feature KD.

    OUTPUT becomes a whole pipeline folder with the student's UNet, a model card and training.jsonl. An interrupted run
    leaves nothing behind.
    """
    config = DistillConfig(
        student=student, steps=steps, batch_size=batch_size, accumulation=accumulation, learning_rate=learning_rate,
        schedule=schedule, warmup=warmup, task_weight=task_weight, output_weight=output_weight,
        feature_weight=feature_weight, pairs=pairs, max_grad_norm=max_grad_norm, ema=ema,
        caption_dropout=caption_dropout, max_images=max_images, resolution=resolution, precision=precision,
        device=device, seed=seed, log_every=log_every,
    )  # fmt: skip
    with progress("distill") as report:
        summary = run(teacher, data, output, config, overwrite=overwrite, report=report)
    if json:
        show_json(summary)
        return
    _tell(summary)


def run(
    teacher: str, data: str, output: Path, config: DistillConfig, *, overwrite: bool = False, report: Progress = quiet
) -> dict[str, Any]:
    """What the command does; returns its summary. All or nothing: the output folder appears when it is complete."""
    from sdkd.distill.latents import training_size
    from sdkd.distill.trainer import distill as train

    source, images = resolve(teacher), open_images(data)
    check_free(output, overwrite)
    report("loading the teacher", 0.0)
    pipe = load_eager(teacher)
    origin = Origin(
        source.name,
        data,
        min(len(images), config.max_images or len(images)),
        training_size(pipe, config.resolution),
        source.random_weights,
        command_line(),
    )
    with new_folder(output, overwrite) as partial:
        done = train(pipe, build_student(pipe.unet, config.student), images, config, report, partial / LOG)
        last, counts = done.history[-1], [count_parameters(unet.config) for unet in (done.student_unet, pipe.unet)]
        card = model_card(
            origin, config, parameters=counts[0], teacher_parameters=counts[1], seconds=done.seconds, last=last
        )
        write_pipeline(pipe, partial, unet=done.student_unet.cpu(), about=about(origin, config, last), readme=card)
    return {
        "output": str(output),
        "teacher": origin.teacher,
        "student": config.spec.name,
        "student_parameters": counts[0],
        "teacher_parameters": counts[1],
        "steps": done.steps,
        "seconds": done.seconds,
        "first": done.history[0],
        "last": last,
    }


def command_line() -> str:
    """The command as it was typed, for the model card."""
    return shlex.join(["sdkd", *sys.argv[1:]])


def _tell(summary: dict[str, Any]) -> None:
    first, last = summary["first"], summary["last"]
    rows = [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in first if name.startswith("loss/")]
    show(table(f"Losses of {summary['student']}", ["", f"to step {first['step']}", f"to step {last['step']}"], rows))
    show(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s. Saved {summary['output']}. "
        f"Try it: sdkd generate {summary['output']} 'a prompt'"
    )
