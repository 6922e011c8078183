"""`sdkd remap-lora`: a LoRA made for a teacher, rewritten for a student of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.core.console import show, show_json
from sdkd.core.files import check_file_free
from sdkd.core.marks import is_written_lora
from sdkd.families import STUDENT_NAMES, StudentSpec, family_named


def remap(
    lora: Annotated[Path, typer.Argument(help="A LoRA's .safetensors file, or a folder that holds one.")],
    output: Annotated[Path, typer.Argument(help="The new file, or a folder for it.")],
    student: Annotated[str, typer.Option(help=STUDENT_NAMES)],
    teacher: Annotated[
        str | None, typer.Option(help="The model that the LoRA is for; its config is read. [default: SD 1.5, or SDXL]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a LoRA that sdkd wrote.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Make a LoRA of SD 1.x/2.x or SDXL fit a student: what it does to the kept layers stays exactly the same.

    Takes diffusers', PEFT's and kohya's names and writes PEFT's, each layer's alpha inside its matrices. The student
    with the new LoRA equals the student built from the teacher with the old one fused; weights of removed layers are
    left out. A LoRA that was made for the student itself stays as it is, and that is said.
    """
    found = run(lora, output, student, teacher, overwrite=overwrite)
    if json:
        show_json(found)
        return
    whose = found["student"] if found["made_for"] == "student" else "the teacher"
    show(
        f"Taken for a LoRA of {whose}: {found['why']}.\n"
        f"Kept {found['kept']} of {found['weights']} weights for {found['student']} ({found['removed']} belong to "
        f"removed layers). Saved {found['output']}."
    )


def run(
    lora: Path, output: Path, student: str, teacher: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """What the command does; returns its summary. Raises InputError, ModelError and OutputExistsError."""
    from sdkd.students.blocks import key_map, student_config, student_spec
    from sdkd.students.lora_file import FILE, lora_about, read_lora, write_lora
    from sdkd.students.lora_fit import check_text_width, fit_student
    from sdkd.students.lora_layers import peft_settings, read_layers, remap_settings, text_state

    file = output if output.suffix == ".safetensors" else output / FILE
    check_file_free(file, overwrite, [lora, teacher], ours=is_written_lora)
    spec = student_spec(student)
    config = _teacher_config(teacher, spec)
    own = student_config(config, spec)
    what = f"LoRA {str(lora)!r}"
    state, settings = read_lora(lora)
    check_text_width(state, config, what)
    layers = read_layers(state, what, settings)
    fit = fit_student(layers.get("unet", {}), own, config, spec, what, unclear="teacher", whole_teacher=True)
    kept = dict(fit.state)
    for part in (part for part in layers if part != "unet"):
        kept |= text_state(part, layers[part])
    if settings and fit.owner == "teacher":
        settings = remap_settings(settings, key_map(config, spec))
    write_lora(file, kept, peft_settings(kept, settings), lora_about(lora))
    weights = 2 * sum(map(len, layers.values()))
    return {
        "lora": str(lora),
        "output": str(file),
        "student": spec.name,
        "made_for": "student" if fit.owner == "model" else "teacher",
        "why": fit.why,
        "weights": weights,
        "kept": len(kept),
        "removed": weights - len(kept),
    }


def _teacher_config(teacher: str | None, spec: StudentSpec) -> Mapping[str, Any]:
    """The UNet config of the model that was named, else of its family's first published one."""
    from sdkd.models.resolve import resolve
    from sdkd.students.blocks import full_config

    if teacher is not None:
        return resolve(teacher).unet_config
    return full_config(next(iter(family_named(spec.family).models.values())).unet)
