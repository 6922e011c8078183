"""`sdkd student`: build a student from a teacher, without training, and say what was kept and what it costs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.core.console import progress, show, show_json, table
from sdkd.core.files import check_free, new_folder
from sdkd.core.interrupts import between_steps
from sdkd.families import STUDENT_NAMES
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.generation import entry
from sdkd.models.replacements import with_vae
from sdkd.models.resolve import load_eager, resolve
from sdkd.students.blocks import (
    build_student,
    count_macs,
    key_map,
    meta_unet,
    student_config,
    student_spec,
    teacher_key,
)

_TRANSFORMER_BLOCK = re.compile(r"attentions\.\d+\.transformer_blocks\.\d+")
_OUTSIDE = "outside"  # of the blocks: conv_in, time_embedding, ...
_STAGES = (_OUTSIDE, "down_blocks", "mid_block", "up_blocks")


def _order(part: str) -> tuple[int, str]:
    """Sort key: the order in which an image goes through the UNet."""
    return _STAGES.index(part.split(".")[0]), part


def report(teacher_config: Mapping[str, Any], student: str) -> dict[str, Any]:
    """What a student keeps of a teacher, as JSON-ready data; nothing is loaded, all is counted on the meta device.

    `parts` has one row per block of the teacher: layers kept and dropped, of kept attentions also the transformer
    blocks that are dropped, parameters before and after. MACs are of one forward pass at the config's own latent size,
    batch 1, 77 tokens, attention products included.
    """
    spec, modules = student_spec(student), key_map(teacher_config, student)
    config = student_config(teacher_config, spec)
    sizes = {name: weight.numel() for name, weight in meta_unet(teacher_config).state_dict().items()}
    used = {teacher_key(name, modules) for name in meta_unet(config).state_dict()}
    return {
        "student": spec.name,
        "latent_size": teacher_config.get("sample_size") or 64,
        "parts": [_part(name, sizes, used) for name in sorted({_part_name(key) for key in sizes}, key=_order)],
        "teacher_parameters": sum(sizes.values()),
        "student_parameters": sum(sizes[name] for name in used),
        "teacher_macs": count_macs(teacher_config),
        "student_macs": count_macs(config),
    }


def _part_name(key: str) -> str:
    """`down_blocks.0.resnets.1.conv1.weight` -> `down_blocks.0`."""
    parts = key.split(".")
    if parts[0] == "mid_block":
        return parts[0]
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else _OUTSIDE


def _layer_name(key: str, part: str) -> str:
    """`down_blocks.0.resnets.1.conv1.weight` -> `resnets.1`; outside the blocks the module's own name."""
    parts = key.split(".")
    if part == _OUTSIDE:
        return parts[0]
    return ".".join(parts[1:3] if part == "mid_block" else parts[2:4])


def _transformer_block(key: str) -> str | None:
    """`down_blocks.2.attentions.0.transformer_blocks.4.norm1.bias` -> `attentions.0.transformer_blocks.4`."""
    found = _TRANSFORMER_BLOCK.search(key)
    return found and found[0]


def _part(part: str, sizes: Mapping[str, int], used: set[str]) -> dict[str, Any]:
    keys = [key for key in sizes if _part_name(key) == part]
    layers = dict.fromkeys(_layer_name(key, part) for key in keys)
    kept = dict.fromkeys(_layer_name(key, part) for key in keys if key in used)
    cut = (key for key in keys if key not in used and _layer_name(key, part) in kept)
    blocks = dict.fromkeys(_transformer_block(key) for key in cut)
    return {
        "part": part,
        "kept": list(kept),
        "dropped": [*(layer for layer in layers if layer not in kept), *filter(None, blocks)],
        "teacher_parameters": sum(sizes[key] for key in keys),
        "student_parameters": sum(sizes[key] for key in keys if key in used),
    }


def _short(layers: list[str]) -> str:
    """`resnets.0, resnets.2, conv_in` -> `resnets 0+2, conv_in`; a sampler, alone in its block, needs no number.

    Of transformer blocks their number: `6 blocks of attentions 0`.
    """
    groups: dict[str, list[str]] = {}
    for layer in sorted(layers):
        kind, dot, index = layer.rpartition(".")
        groups.setdefault(kind or index, []).append(index if dot and not kind.endswith("samplers") else "")
    return ", ".join(_group(kind, indices) for kind, indices in groups.items()) or "-"


def _group(kind: str, indices: list[str]) -> str:
    layer, inner, _ = kind.rpartition(".")
    if inner:
        return f"{len(indices)} block{'s' * (len(indices) > 1)} of {layer.replace('.', ' ')}"
    return f"{kind} {'+'.join(indices)}".strip()


def tables(found: Mapping[str, Any]) -> list[Any]:
    """The report as tables for people."""
    rows = []
    for row in found["parts"]:
        counts = (f"{row[f'{of}_parameters']:,}" for of in ("teacher", "student"))
        rows.append([row["part"], _short(row["kept"]), _short(row["dropped"]), *counts])
    size = found["latent_size"]
    cost = (
        ("parameters", found["teacher_parameters"], found["student_parameters"], ","),
        (f"GMACs per step ({size}x{size} latents)", found["teacher_macs"] / 1e9, found["student_macs"] / 1e9, ",.3f"),
    )
    whole = [
        [name, f"{before:{form}}", f"{after:{form}}", f"{100 * after / before:.1f} %"]
        for name, before, after, form in cost
    ]
    return [
        table(f"UNet of {found['student']}", ["teacher's part", "kept", "dropped", "parameters", "left"], rows),
        table("Cost of the UNet", ["", "teacher", "student", "left"], whole),
    ]


def student(
    teacher: Annotated[str, typer.Argument(help="A diffusers folder, hub id, .safetensors, demo or random:sd15.")],
    output: Annotated[Path, typer.Argument(help="Folder for the student's pipeline.")],
    student: Annotated[str, typer.Option("--student", "-s", help=STUDENT_NAMES)],
    vae: Annotated[str | None, typer.Option(help="Another VAE for the pipeline, as `sdkd export` takes it.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Save the weights in float16.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Build a student from a teacher without training: fewer blocks, the teacher's own weights in those that stay.

    OUTPUT becomes a whole pipeline folder. Its images are poor until it is distilled (sdkd distill).
    """
    import torch

    spec, source = student_spec(student), with_vae(resolve(teacher), vae)
    check_free(output, overwrite, [teacher, vae])
    key_map(source.unet_config, spec)  # refuses a teacher that is none of this student, before weights are read
    with progress("student") as step:
        step("loading the teacher", 0.0)
        pipe = load_eager(source, torch.float16 if half else None)
        with between_steps() as check, new_folder(output, overwrite, [teacher, vae]) as partial:
            check()
            step("copying the weights", 0.5)
            unet = build_student(pipe.unet, spec)
            check()
            found = {"teacher": source.name, "output": str(output), **report(pipe.unet.config, spec.name)}
            step("saving", 0.8)
            about = {"teacher": source.name, "student": spec.name, "random_weights": source.random_weights, "steps": 0}
            write_pipeline(pipe, partial, unet=unet, about=about | entry(source.generation))
            check()
    if json:
        show_json(found)
        return
    show(*tables(found))
    for note in source.notes:
        show(f"Note on {source.name}: {note}.")
    if vae is not None:
        show("Training writes the teacher's VAE into its result: give --vae again when that is exported.")
    show(
        f"Saved {output}. Train it with: sdkd distill --teacher {shlex.quote(teacher)} --student {spec.short} "
        "--data DATA --output RUN"
    )
