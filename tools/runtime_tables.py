"""The tables of tools/bench_runtime.py: overhead of denoising steps, whole images, forms of attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bench_attention import attention_lines

SLOTS = {"onnxruntime": "fp32", "openvino": "fp32", "openvino-bf16": "bf16"}
PIECES = ("overhead", *SLOTS, "peer", "teacher", "attention")


def markdown(found: Mapping[str, Any]) -> str:
    """The tables for people."""
    lines = ["# The runtime", "", f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}."]
    for name in [name for name in PIECES if name in found]:
        write = {"overhead": _overhead_lines, "attention": attention_lines}.get(name, partial(_image_lines, name))
        lines += ["", *write(found[name], found)]
        run = found["runs"].get(name, {})
        if run and (run["commit"], run["date"]) != (found["commit"], found["date"]):
            lines += ["", f"Of {run['date']}, commit {run['commit']}."]
    return "\n".join([*lines, "", "Made again by:", "", f"    {found['command']}", ""])


def _overhead_lines(rows: list[dict[str, Any]], _: Mapping[str, Any]) -> list[str]:
    return [
        "## Denoising steps in a pipeline, with guidance: the library's bare call on the same tensors, and the rest",
        "",
        "| model | target | bare, ms | EngineUNet, ms | overhead, ms (95 %) | share | loop, ms | whole step's share |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *map(_overhead_line, rows),
        "",
        "Overhead: median of the differences of pairs. Loop: guidance, scheduler and diffusers' own Python between two",
        "UNet calls. Share: of the bare call; the whole step's adds the loop.",
    ]


def _overhead_line(row: Mapping[str, Any]) -> str:
    times = f"{row['bare_seconds'] * 1e3:,.2f} | {row['runtime_seconds'] * 1e3:,.2f}"
    overhead = "{:.3f} ({:.3f} to {:.3f})".format(*(value * 1e3 for value in row["overhead_seconds"]))
    shares = f"{row['overhead_share'][0]:.2%} | {row['loop_seconds'] * 1e3:.2f} | {row['step_overhead_share'][0]:.2%}"
    return f"| {row['model']} | {row['slot']} | {times} | {overhead} | {shares} |"


def _image_lines(piece: str, rows: list[dict[str, Any]], found: Mapping[str, Any]) -> list[str]:
    settings = found["settings"]
    return [
        f"## Whole images, {piece}: {settings['steps']} steps, {settings['size']} px, guidance 7.5",
        "",
        "| way | image, s | UNet call, ms | outside, ms per step | UNet call | image | PSNR, dB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *map(_image_line, rows),
        "",
        f"Times faster than {rows[0]['way']}: ratios of medians with a 95 % bootstrap interval over paired rounds.",
        "PSNR: of the image, to the first way's. Outside: what is neither UNet, VAE nor text encoder.",
    ]


def _image_line(row: Mapping[str, Any]) -> str:
    likeness = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
    return (
        f"| {row['way']} | {row['seconds']:.2f} | {row['unet_step_seconds'] * 1e3:,.0f} | "
        f"{row['outside_per_step_seconds'] * 1e3:.1f} | {_cell(row['unet_faster'])} | {_cell(row['image_faster'])} | "
        f"{likeness} |"
    )


def _cell(ratio: list[float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})"
