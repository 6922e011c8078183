"""A whole report with planted figures and drawn images: what the page, the tables and the JSON are tested on."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from quantized_records import FLAGS
from rich.console import Console, RenderableType

from sdkd.bundle.quantized import Quantized
from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.limits import Ceilings, Work, fraction
from sdkd.compare.measure.quality import Likeness, judge_engine, likeness
from sdkd.compare.measure.results import Report, Result, Setup
from sdkd.compare.measure.stats import Spread, speedup
from sdkd.compare.measure.subjects import Subject
from sdkd.models.generation import Generation

PROMPTS = (
    "a large red star on a blue background",
    "a small yellow circle on a green background",
    "a large white ring on a purple background",
)
COLOURS = (("#c33", "#24c"), ("#fc2", "#285"), ("#fff", "#528"))
ENVIRONMENT = {
    "date_utc": "2026-01-02T03:04:05+00:00", "device": "cpu", "cpu": "Example CPU @ 2.10GHz",
    "cpu_features": ["avx2", "avx512f", "amx_bf16"], "cpu_mhz": 2100, "cores_physical": 1, "cores_usable": 2,
    "threads_torch": 2, "threads_environment": {}, "load_average": [0.11, 0.2, 0.19], "memory_total_gb": 25.1,
    "gpu": None, "gpu_driver": None, "cuda": None, "os": "Debian GNU/Linux 12 (bookworm), kernel 6.1, x86_64",
    "python": "3.11.9",
    "versions": {"sdkd": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "onnxruntime": "1.32.0"},
}  # fmt: skip
USUAL, FEW = Generation(25, 4.0, "PNDMScheduler"), Generation(4, 1.0, "LCMScheduler")
# model: (step in ms when eager, UNet parameters, how far its drawing is moved)
MODELS = {"teacher": (31.0, 3_210_000, 0), "small": (20.5, 2_110_000, 2), "tiny": (13.2, 1_230_000, 5)}
# target: (precision, speed over eager, noise of its images in grey levels, bytes per parameter)
TARGETS = {
    "eager": ("fp32", 1.0, 0.0, 2),
    "onnxruntime": ("fp32", 1.6, 0.4, 4),
    "openvino": ("fp32", 1.9, 0.5, 4),
    "openvino-bf16": ("bf16", 2.9, 4.0, 4),
}
EIGHT_BITS = {"openvino-int8": ("int8", 4.0, 9.0, 1)}
CEILINGS = {
    "fp32": Ceilings(80e9, 12e9, "product of 1024 × 1024 matrices in float32; copy of 256 MiB, 2 threads"),
    "bf16": Ceilings(210e9, 12e9, "product of 2048 × 2048 matrices in bfloat16; copy of 256 MiB, 2 threads"),
}


def drawing(prompt: int, shift: int, noise: float, seed: int, size: int = 64) -> Image.Image:
    """A disc on a background, moved by `shift` pixels, with noise of so many grey levels."""
    front, back = COLOURS[prompt]
    image = Image.new("RGB", (size, size), back)
    edge, move = size // 6, shift * size // 64
    ImageDraw.Draw(image).ellipse((edge + move, edge, size - edge + move, size - edge), fill=front)
    pixels = np.asarray(image, dtype=np.float64)
    pixels = pixels + np.random.default_rng(seed).normal(0, noise, pixels.shape) if noise else pixels
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def rounds(median: float, seed: int, count: int = 10, burst: int = 3) -> list[list[float]]:
    """Planted samples around a median, with one slow call in twenty."""
    generator = np.random.default_rng(seed)
    values = median * (1 + np.abs(generator.normal(0, 0.02, (count, burst))))
    values[generator.random((count, burst)) < 0.05] *= 1.15
    return [list(map(float, row)) for row in values]


def subjects(models: tuple[str, ...] = tuple(MODELS), eight_bits: bool = False) -> list[Subject]:
    """Every model on every target, with `eight_bits` on those of EIGHT_BITS, too."""
    return [
        Subject(
            f"{model} {target}",
            f"models/{model}",
            target,
            precision,
            None if target == "eager" else Path(f"bundles/{model}"),
            "teacher" if model == "teacher" else "student",
        )
        for model in models
        for target, (precision, *_) in {**TARGETS, **(EIGHT_BITS if eight_bits else {})}.items()
    ]


@cache
def planted_report(
    wrong: str | None = None, judged: bool = True, size: int = 64, models: tuple[str, ...] = tuple(MODELS),
    few: str | None = None, eight_bits: bool = False,
) -> Report:  # fmt: skip
    """The report; images of the subject `wrong` come from another seed, the model `few` draws in 4 unguided steps."""
    rows = subjects(models, eight_bits)
    steps, images = {}, {}
    for seed, subject in enumerate(rows):
        model, (_, speed, noise, _) = subject.model_label, {**TARGETS, **EIGHT_BITS}[subject.target]
        steps[subject.label] = rounds(MODELS[model][0] / speed / 1000, seed)
        shift = MODELS[model][2] + (17 if subject.label == wrong else 0)
        images[subject.label] = [drawing(index, shift, noise, seed, size) for index in range(len(PROMPTS))]
    baselines = {row.label: _baselines(row) for row in rows}
    runs = {row.label: FEW if row.model_label == few else USUAL for row in rows}
    results = tuple(_result(row, steps, images, baselines[row.label], judged, runs) for row in rows)
    how = {"timing": "wall clock", "open_together": True, "confidence": 0.95}
    setup = Setup(PROMPTS, 0, size, runs=30, min_seconds=1.0, **how)
    command = "sdkd compare demo --targets eager,onnxruntime"
    return Report(setup, results, ENVIRONMENT, images, baselines, command, ceilings=CEILINGS)


def _baselines(subject: Subject) -> dict[str, str]:
    found = {"eager": f"{subject.model_label} eager", "teacher": "teacher eager"}
    return {name: label for name, label in found.items() if label != subject.label}


def _whole(samples: list[list[float]], run: Generation) -> list[list[float]]:
    return [[(run.steps + 0.4) * value for value in part[:1]] for part in samples[:6]]


def _result(
    subject: Subject,
    steps: dict[str, list[list[float]]],
    images: dict[str, list[Image.Image]],
    baselines: dict[str, str],
    judged: bool,
    runs: dict[str, Generation],
) -> Result:
    def against(label: str) -> Likeness:
        return likeness(images[subject.label], images[label], label)

    model = subject.model_label
    unet = MODELS[model][1]
    own = None if subject.is_reference else against(f"{model} eager")
    half = [drawing(index, MODELS[model][2], 5.0, 99, images[subject.label][0].width) for index in range(len(PROMPTS))]
    eager_half = likeness(half, images[f"{model} eager"], f"{model} eager")
    samples = steps[subject.label]
    ratios = {name: speedup(steps[label], samples) for name, label in baselines.items()}
    work = Work(flops=340 * unet, bytes=4 * unet)
    rounding = Quantized.of(FLAGS) if subject.is_quantized else None
    ceilings = CEILINGS.get(subject.precision)
    run = runs[subject.label]
    whole = _whole(samples, run)
    faster = {name: speedup(_whole(steps[label], runs[label]), whole) for name, label in baselines.items()}
    return Result(
        subject=subject,
        run=run,
        unet_batch=2 if run.guidance_scale > 1 else 1,
        unet_step_ms=Spread.of(samples, 1000),
        unet_step_cpu_ms=Spread.of(samples, 1900),
        image_s=Spread.of(whole),
        image_cpu_s=Spread.of(whole, 1.9),
        load_s=0.41,
        first_call_s=whole[0][0] + 0.2,
        unet_parameters=unet,
        parameters=unet + 1_480_000,
        bytes_on_disk={**TARGETS, **EIGHT_BITS}[subject.target][3] * (unet + 1_480_000),
        repeatable=True,
        attention="SDPA, flash attention (CPU)" if subject.is_eager else None,
        against_eager=own,
        against_teacher=against("teacher eager") if subject.role == "student" else None,
        verdict=judge_engine(subject, own, eager_half, rounding),
        rounding=rounding,
        step_speedup={name: ratio for name, ratio in ratios.items() if ratio},
        image_speedup={name: ratio for name, ratio in faster.items() if ratio},
        work=work if ceilings else None,
        limit=fraction(work, ceilings, Spread.of(samples).median) if ceilings else None,
        judged={"shape": 0.9, "colour": 1.0, "background": 1.0} if judged else None,
        text_encoder_ms=Spread.of([[3.1, 3.0], [3.2, 3.1], [3.0, 3.1]]),
        vae_decode_ms=Spread.of([[12.0, 12.5], [12.1, 11.9], [12.2, 12.0]]),
        unet_calls=run.steps,
        memory=Memory(base_rss=350_000_000, growth=52_000_000, peak_rss=8 * unet + 60_000_000),
    )


def printed(table: RenderableType) -> str:
    """What a terminal of 80 columns shows; nothing in it is cut."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    return text
