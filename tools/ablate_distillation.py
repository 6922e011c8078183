"""What each part of the distillation recipe brings, on the embedded models: a table and a plot under benchmarks/.

    python tools/ablate_distillation.py                     # 2 students x 5 variants x 3 seeds; about 2 minutes a run
    python tools/ablate_distillation.py --seeds 0 --students tiny
    python tools/ablate_distillation.py --report            # only the table and the plot, from the runs that are there
    python tools/ablate_distillation.py --why               # d and e of tiny, asked about captions of other images too

A run that is there already (same settings) is kept, so that an interrupted series goes on. Every run trains the same
number of steps on the same images; only what the table names differs.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from bench_kit.demo_models import Lessons, kept, write_ablation
from bench_kit.results import ROOT, commit, span

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json, write_json

FOLDER = ROOT / "benchmarks" / "ablation-demo"


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    images: int = 1536
    scenes: int = 60  # captions drawn, of each kind
    probe: int = 32  # images that the UNets are asked about
    sampling_steps: int = 25
    guidance_scale: float = 4.0


# Variant -> (copy the teacher's weights, settings of the losses)
VARIANTS: dict[str, tuple[bool, dict[str, float]]] = {
    "a: random weights, task loss": (False, {"output_weight": 0.0, "feature_weight": 0.0}),
    "b: copied weights, task loss": (True, {"output_weight": 0.0, "feature_weight": 0.0}),
    "c: b + output KD": (True, {"output_weight": 0.5, "feature_weight": 0.0}),
    "d: c + feature KD": (True, {"output_weight": 0.5, "feature_weight": 0.5}),
    "e: d + random conditioning": (True, {"output_weight": 0.5, "feature_weight": 0.5, "random_conditioning": 0.5}),
}


class Examined(Lessons):
    """Lessons, and what the students' UNets are asked about; made once."""

    def __init__(self, settings: Settings) -> None:
        from sdkd.evaluate.agreement import make_probe
        from sdkd.toyworld.scenes import DemoImages

        super().__init__(settings.images, settings.scenes)
        self.probe = make_probe(self.pipe, DemoImages(count=settings.probe, seed=99, held_out=True), settings.probe)


def trained(lessons: Examined, student: str, variant: str, seed: int, settings: Settings) -> tuple[Any, Any]:
    """A student, with its teacher's weights or random ones at first, in a pipeline of the teacher's other parts.

    And how its training went.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from sdkd.distill import TrainConfig, train
    from sdkd.students.blocks import build_student, student_config

    copied, losses = VARIANTS[variant]
    config = TrainConfig(
        student=student, steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        precision="fp32", device="cpu", seed=seed, log_every=50, **losses,  # type: ignore[arg-type]
    )  # fmt: skip
    if copied:
        unet = build_student(lessons.pipe.unet, student)
    else:
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**student_config(lessons.pipe.unet.config, student))
    done = train(lessons.pipe, unet, lessons.latents, config)
    return lessons.drawn_by(done.unet), done


def one_run(lessons: Examined, student: str, variant: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one student and examine it: agreement with the teacher, and caption accuracy."""
    from sdkd.evaluate.agreement import noise_agreement
    from sdkd.toyworld.reader import JUDGED, evaluate_captions

    pipe, done = trained(lessons, student, variant, seed, settings)
    agreement = noise_agreement(pipe, lessons.probe)
    found: dict[str, Any] = {"train_seconds": done.seconds, "last": done.history[-1]}
    found |= {"noise_mse": agreement.mean, "noise_mse_buckets": list(agreement.buckets)}
    for kind, scenes in lessons.scenes.items():
        accuracy = evaluate_captions(pipe, scenes, settings.sampling_steps, settings.guidance_scale).accuracy
        found[kind] = {name: accuracy[name] for name in JUDGED}
    return found


def series(students: list[str], seeds: list[int], settings: Settings) -> None:
    """All runs that are not there yet, seed by seed."""
    lessons: Examined | None = None
    for seed, student, variant in itertools.product(seeds, students, VARIANTS):
        path = FOLDER / "runs" / f"{student}-{variant[0]}-{seed}.json"
        if kept(path, settings):
            continue
        lessons = lessons or Examined(settings)
        named = {"student": student, "variant": variant, "seed": seed, "settings": asdict(settings), "commit": commit()}
        run = named | one_run(lessons, student, variant, seed, settings)
        write_json(path, run)
        print(f"{student}, {variant}, seed {seed}: {run['noise_mse']:.4f}", flush=True)


def why(settings: Settings, student: str = "tiny", seed: int = 0) -> None:
    """What random conditioning is for: noise MSE with the images' own captions, and with captions of other images."""
    from sdkd.evaluate.agreement import make_probe, noise_agreement
    from sdkd.toyworld.scenes import DemoImages

    lessons = Examined(settings)
    rows = DemoImages(count=settings.probe, seed=99, held_out=True)
    swapped = [{**rows[i], "caption": rows[(i + 1) % settings.probe]["caption"]} for i in range(settings.probe)]
    probes = {"own": lessons.probe, "other": make_probe(lessons.pipe, swapped, settings.probe)}
    found: dict[str, Any] = {"student": student, "seed": seed, "settings": asdict(settings), "commit": commit()}
    for variant in list(VARIANTS)[3:]:
        pipe, _ = trained(lessons, student, variant, seed, settings)
        found[variant] = {name: noise_agreement(pipe, probe).mean for name, probe in probes.items()}
        print(variant, found[variant], flush=True)
    write_json(FOLDER / "why.json", found)


def rows() -> list[dict[str, Any]]:
    """One row per student and variant: every seed's values, their mean and range."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((FOLDER / "runs").glob("*.json")):
        run = read_json(path)
        found.setdefault((run["student"], run["variant"]), []).append(run)
    made = []
    for (student, variant), runs in sorted(found.items()):
        values = {
            "noise_mse": [run["noise_mse"] for run in runs],
            **{kind: [mean(run[kind].values()) for run in runs] for kind in ("seen", "held_out")},
            **{f"shape_{kind}": [run[kind]["shape"] for run in runs] for kind in ("seen", "held_out")},
        }
        made.append({"student": student, "variant": variant, "seeds": [run["seed"] for run in runs], **values})
    return made


def markdown(made: list[dict[str, Any]], settings: Settings) -> str:
    """The table for people."""
    lines = [
        "# What each part of the distillation brings (embedded models)",
        "",
        f"{settings.steps} steps of {settings.batch_size} images, learning rate {settings.learning_rate:g}, on a CPU. "
        "Mean over seeds, and the range. Noise MSE: between what student and teacher predict on held-out images "
        f"(lower is better). Captions: share of {settings.scenes} seen and {settings.scenes} held-out captions whose "
        "shape, colour and background a reader finds in the image.",
        "",
    ]
    heads = ("student", "variant", "seeds", "noise MSE", "captions, seen", "held out", "shape, seen", "shape, held out")
    names = ("seen", "held_out", "shape_seen", "shape_held_out")
    cells = [
        [row["student"], row["variant"], str(len(row["seeds"])), span(row["noise_mse"], ".4f", " to "),
         *(span(row[name], ".0%", " to ") for name in names)]
        for row in made
    ]  # fmt: skip
    lines += markdown_table(heads, cells, left=2)
    if (path := FOLDER / "why.json").is_file():
        found = read_json(path)
        without, with_it = (found[name] for name in list(VARIANTS)[3:])
        lines += [
            "",
            f"Random conditioning, asked of {found['student']} (seed {found['seed']}, `--why`): noise MSE with the "
            f"images' own captions {without['own']:.4f} without it and {with_it['own']:.4f} with it; with captions of "
            f"other images {without['other']:.4f} and {with_it['other']:.4f}.",
        ]
    return "\n".join([*lines, "", "![plot](ablation.png)", "", "Made by `python tools/ablate_distillation.py`.", ""])


def plot(made: list[dict[str, Any]], path: Path) -> None:
    """Noise MSE and shape accuracy of every variant, with a dot for every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (("noise_mse", "noise MSE to the teacher"), ("shape_held_out", "shapes right, held-out captions"))
    colours = {"small": "#0d8b77", "tiny": "#c8611b"}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for student, colour in colours.items():
            own = [row for row in made if row["student"] == student]
            places = [ord(row["variant"][0]) - ord("a") + (0.08 if student == "tiny" else -0.08) for row in own]
            axes.plot(places, [mean(row[name]) for row in own], color=colour, label=student, linewidth=1)
            for place, row in zip(places, own, strict=True):
                axes.plot([place] * len(row[name]), row[name], "o", color=colour, markersize=4)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xticks(range(len(VARIANTS)), [variant[0] for variant in VARIANTS])
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.axes[0].set_yscale("log")
    figure.axes[1].set_ylim(0, 1)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", default="small,tiny")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    parser.add_argument("--why", action="store_true", help="what random conditioning changes")
    asked = parser.parse_args()
    settings = Settings()
    if asked.why:
        why(settings)
    elif not asked.report:
        series(asked.students.split(","), [int(seed) for seed in asked.seeds.split(",")], settings)
    made = rows()
    write_ablation(FOLDER, settings, made, plot, markdown(made, settings))


if __name__ == "__main__":
    main()
