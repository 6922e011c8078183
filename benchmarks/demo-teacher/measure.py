"""Measure the demo teacher on this machine -> accuracy.json and samples.png beside this file.

    python benchmarks/demo-teacher/measure.py

The pictures are named by sdkd.toyworld.reader, whose own accuracy on drawings and on VAE
reconstructions is measured too.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from sdkd.core.files import read_json, write_json
from sdkd.demo import teacher_path
from sdkd.toyworld.reader import CaptionAccuracy, draw, read_image
from sdkd.toyworld.scenes import SHAPES, Scene, all_scenes, caption, held_out_scenes, render, sample_scenes, seen_scenes

HERE = Path(__file__).parent
DRAWING = 987_654  # a seed of drawings that was not trained on


def summary(result: CaptionAccuracy) -> dict[str, Any]:
    """Counts and shares per attribute, and the captions whose shape or colours are wrong."""
    wrong = []
    for scene, reading in zip(result.scenes, result.readings, strict=True):
        agreed = reading.agrees(scene)
        if not (agreed["shape"] and agreed["colour"] and agreed["background"]):
            wrong.append(f"{caption(scene)} -> {reading.size} {reading.colour} {reading.shape} on {reading.background}")
    return {"count": result.count, "right": result.right, "accuracy": result.accuracy, "wrong": wrong}


def read_all(scenes: Sequence[Scene], images: Sequence[Image.Image]) -> CaptionAccuracy:
    """The accuracy of images that are already there."""
    return CaptionAccuracy(tuple(scenes), tuple(map(read_image, images)))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB pixels as float32 [3, height, width] of -1..1."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


@torch.no_grad()
def reconstructions(pipe: Any, drawings: Sequence[Image.Image]) -> list[Image.Image]:
    """The drawings after the VAE's encoder and decoder."""
    images: list[Image.Image] = []
    for start in range(0, len(drawings), 50):
        pixels = torch.stack([to_tensor(image) for image in drawings[start : start + 50]])
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        images += pipe.image_processor.postprocess(decoded, output_type="pil")
    return images


def grid(scenes: Sequence[Scene], images: Sequence[Image.Image], columns: int = 8, zoom: int = 2) -> Image.Image:
    """The images with their captions below, wrong readings marked in red."""
    side, line = 64 * zoom, 12
    cell_width, cell_height = side + 42, side + 4 * line
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        x, y = place % columns * cell_width + 4, place // columns * cell_height + 4
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        agreed = read_image(image).agrees(scene)
        words = [f"{scene.size} {scene.colour} {scene.shape}", f"on {scene.background}", scene.position]
        for number, text in enumerate(words):
            pen.text((x, y + side + number * line), text, fill="black" if all(agreed.values()) else "red")
    return sheet


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="another pipeline folder than the packaged teacher")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--scheduler", default=None, help="a diffusers scheduler class in place of the model's own")
    parser.add_argument("--count", type=int, default=200, help="seen captions; held-out captions are 3/5 of it")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=40)
    args = parser.parse_args()
    import diffusers

    path = args.model or teacher_path()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path)
    if args.scheduler:
        pipe.scheduler = getattr(diffusers, args.scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings = (args.steps, args.guidance_scale, args.seed, args.batch_size)
    sets = {
        "seen": sample_scenes(seen_scenes(), args.count, args.seed),
        "held_out": sample_scenes(held_out_scenes(), args.count * 3 // 5, args.seed),
    }
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/demo-teacher/measure.py", *sys.argv[1:]]),
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        "scheduler": type(pipe.scheduler).__name__,
    }
    for name, scenes in sets.items():
        start = time.perf_counter()
        images = draw(pipe, scenes, *settings)
        seconds = time.perf_counter() - start
        report[name] = {**summary(read_all(scenes, images)), "batch_size": args.batch_size, "total_s": seconds}
    chosen = sample_scenes(all_scenes(), 1000, args.seed)
    drawings = [render(scene, DRAWING) for scene in chosen]
    report["reader_on_drawings"] = summary(read_all(chosen, drawings))
    report["reader_on_vae_reconstructions"] = summary(read_all(chosen, reconstructions(pipe, drawings)))
    log = HERE / "training.jsonl"
    if log.exists():
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        report["training"] = [record for record in records if record.get("finished") or "count" in record]
    report["parameters"] = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "text_encoder", "vae")
    }
    report["model_index"] = {key: value for key, value in read_json(path / "model_index.json").items() if key[0] != "_"}
    report["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")}
    report["versions"]["python"] = platform.python_version()
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "accuracy.json", report)
    shown = [next(scene for scene in sets[name] if scene.shape == shape) for name in sets for shape in SHAPES]
    shown += sample_scenes(seen_scenes(), 24, args.seed + 1)
    grid(shown, draw(pipe, shown, *settings)).save(args.output / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
