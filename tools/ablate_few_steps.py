"""What each part of few-step distillation brings, on the embedded models: a table and a plot under benchmarks/.

    python tools/ablate_few_steps.py                     # 6 variants x 3 seeds of the tiny student; 5 minutes a run
    python tools/ablate_few_steps.py --seeds 0 --variants a,b
    python tools/ablate_few_steps.py --report            # only the table and the plot, from the runs that are there

For each seed the student is first distilled by KD; every variant then trains the same number of steps by the
consistency objective. All are asked for the same captions from the same noise, in 1, 2, 4 and 8 steps, beside the
teacher and the student as it was. A run that is there already (same settings) is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from bench_kit.demo_models import Lessons, kept, write_ablation
from bench_kit.results import NONE, ROOT, commit, span

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json, write_json

FOLDER = ROOT / "benchmarks" / "ablation-few-steps"
STUDENT, FEW, KINDS = "tiny", (1, 2, 4, 8), ("seen", "held_out")


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    kd_steps: int = 240
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3
    least_w: float = 2.0
    most_w: float = 4.0
    solver_steps: int = 20
    images: int = 1536
    scenes: int = 60  # captions drawn, of each kind
    sampling_steps: int = 25
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class Variant:
    """`distilled`: KD came before; `full`: the teacher is the whole model, not a copy of the student."""

    words: str
    distilled: bool = True
    full: bool = True
    feature_weight: float = 0.0
    snr_gamma: float = 5.0


TEACHER, BEFORE = "teacher", "student"
VARIANTS = {
    "a": Variant("from the full teacher"),
    "b": Variant("from a copy of the student", full=False),
    "c": Variant("from the full teacher, no KD before", distilled=False),
    "d": Variant("from the full teacher, feature KD of weight 0.01", feature_weight=0.01),
    "e": Variant("from the full teacher, feature KD of weight 0.1", feature_weight=0.1),
    "f": Variant("from the full teacher, no min-SNR weights", snr_gamma=0.0),
}
WORDS = {
    TEACHER: "the teacher",
    BEFORE: "the student after KD alone",
    **{name: one.words for name, one in VARIANTS.items()},
}


def before(lessons: Lessons, seed: int, settings: Settings) -> Any:
    """The student that KD made of the teacher."""
    from sdkd.distill import TrainConfig, train
    from sdkd.students.blocks import build_student

    config = TrainConfig(
        student=STUDENT, steps=settings.kd_steps, batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, precision="fp32", device="cpu", seed=seed,
    )  # fmt: skip
    return train(lessons.pipe, build_student(lessons.pipe.unet, STUDENT), lessons.latents, config).unet


def few_step(lessons: Lessons, student: Any, variant: Variant, seed: int, settings: Settings) -> Any:
    """A pipeline of the student after the variant's consistency distillation."""
    import copy

    from sdkd.distill import TrainConfig, train
    from sdkd.distill.training.drawing import result_scheduler
    from sdkd.students.blocks import build_student

    config = TrainConfig(
        objective="consistency", student=STUDENT if variant.full else "same", steps=settings.steps,
        batch_size=settings.batch_size, learning_rate=settings.learning_rate, feature_weight=variant.feature_weight,
        guidance=(settings.least_w, settings.most_w), solver_steps=settings.solver_steps, snr_gamma=variant.snr_gamma,
        caption_dropout=0.0, precision="fp32", device="cpu", seed=seed,
    )  # fmt: skip
    unet = copy.deepcopy(student) if variant.distilled else build_student(lessons.pipe.unet, STUDENT)
    teacher = lessons.pipe if variant.full else lessons.drawn_by(student)
    pipe = lessons.drawn_by(train(teacher, unet, lessons.latents, config).unet)
    pipe.scheduler = result_scheduler(lessons.pipe.scheduler, config, None)
    return pipe


class Exam:
    """Captions and noise that are the same for all, and the teacher's images of them."""

    def __init__(self, lessons: Lessons, settings: Settings) -> None:
        self.lessons = lessons
        self.reference = self._drawn(lessons.pipe, settings.sampling_steps, settings.guidance_scale)

    def _drawn(self, pipe: Any, steps: int, guidance_scale: float) -> dict[str, list[Any]]:
        from sdkd.toyworld.reader import draw

        return {
            kind: draw(pipe, self.lessons.scenes[kind], steps, guidance_scale, seed=0, batch_size=30) for kind in KINDS
        }

    def marks(self, pipe: Any, steps: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        """By kind of captions: the share right of each attribute, and each image's PSNR to the teacher's, in dB."""
        from sdkd.compare.measure.quality import image_likeness
        from sdkd.toyworld.reader import judge_captions
        from sdkd.toyworld.scenes import caption

        found: dict[str, Any] = {}
        for kind, images in self._drawn(pipe, steps, guidance_scale).items():
            pairs = zip(images, self.reference[kind], strict=True)
            near = [image_likeness(image, reference).counted_db for image, reference in pairs]
            captions = [caption(scene) for scene in self.lessons.scenes[kind]]
            found[kind] = {"right": judge_captions(images, captions), "psnr_db": near}
        return found


def examined(name: str, exam: Exam, student: Any, seed: int, settings: Settings) -> dict[str, Any]:
    """Marks of a row by number of steps; a variant is trained first."""
    if name in VARIANTS:
        pipe = few_step(exam.lessons, student, VARIANTS[name], seed, settings)
        return {str(steps): exam.marks(pipe, steps) for steps in FEW}
    pipe = exam.lessons.pipe if name == TEACHER else exam.lessons.drawn_by(student)
    every = (*FEW, settings.sampling_steps)
    return {str(steps): exam.marks(pipe, steps, settings.guidance_scale) for steps in every}


def series(names: list[str], seeds: list[int], settings: Settings) -> None:
    """All runs that are not there yet, seed by seed; the teacher's is the same for all."""
    exam: Exam | None = None
    for seed in seeds:
        rows = [name for name in (TEACHER, BEFORE, *names) if name != TEACHER or seed == seeds[0]]
        paths = {name: FOLDER / "runs" / f"{name}-{seed}.json" for name in rows}
        wanted = {name: path for name, path in paths.items() if not kept(path, settings)}
        if not wanted:
            continue
        exam = exam or Exam(Lessons(settings.images, settings.scenes), settings)
        student = before(exam.lessons, seed, settings)
        for name, path in wanted.items():
            steps = examined(name, exam, student, seed, settings)
            about = {"row": name, "seed": seed, "settings": asdict(settings), "commit": commit()}
            write_json(path, {**about, "steps": steps})
            said = ", ".join(f"{count}: {right(marks):.0%}" for count, marks in steps.items())
            print(f"{WORDS[name]}, seed {seed}: captions right in steps {said}", flush=True)


def right(marks: Mapping[str, Any]) -> float:
    """Mean share of the attributes that are right, over all captions."""
    return mean(share for kind in KINDS for share in marks[kind]["right"].values())


def near(marks: Mapping[str, Any]) -> float:
    """Mean PSNR to the teacher's images from the same noise, in dB."""
    return mean(one for kind in KINDS for one in marks[kind]["psnr_db"])


FIGURES: dict[str, Callable[[Mapping[str, Any]], float]] = {"right": right, "psnr_db": near}


def rows() -> list[dict[str, Any]]:
    """One row for each row of the table: by number of steps, every seed's captions right and PSNR to the teacher."""
    runs = [read_json(path) for path in sorted((FOLDER / "runs").glob("*.json"))]
    made = []
    for name, words in WORDS.items():
        own = [run for run in runs if run["row"] == name]
        if own:
            found = {
                steps: {key: [of(run["steps"][steps]) for run in own] for key, of in FIGURES.items()}
                for steps in own[0]["steps"]
            }
            made.append({"row": name, "words": words, "seeds": [run["seed"] for run in own], "steps": found})
    return made


def markdown(made: list[dict[str, Any]], settings: Settings) -> str:
    """The tables for people."""
    usual = str(settings.sampling_steps)
    columns = (*map(str, FEW), usual)
    lines = [
        "# What each part of few-step distillation brings (embedded models)",
        "",
        f"The tiny student after {settings.kd_steps} steps of KD, then {settings.steps} steps of the consistency "
        f"objective with {settings.batch_size} images each, learning rate {settings.learning_rate:g}, w "
        f"{settings.least_w:g} to {settings.most_w:g}, a solver of {settings.solver_steps} points, on a CPU. Mean over "
        f"seeds, and the range. Captions right: the share of shapes, colours and backgrounds that a reader finds in "
        f"images of {settings.scenes} seen and {settings.scenes} held-out captions. The teacher and the student "
        f"after KD alone are drawn with guidance {settings.guidance_scale:g}, the others without.",
    ]
    for title, key, form in (("Captions right", "right", ".0%"), ("PSNR to the teacher, dB", "psnr_db", ".1f")):
        cells = [
            [row["words"], str(len(row["seeds"])),
             *(span(row["steps"][steps][key], form) if steps in row["steps"] else NONE for steps in columns)]
            for row in made if key == "right" or row["row"] != TEACHER
        ]  # fmt: skip
        heads = ("", "seeds", *(f"{steps} step{'' if steps == '1' else 's'}" for steps in columns))
        lines += ["", f"## {title}", "", *markdown_table(heads, cells, left=1)]
    return "\n".join([*lines, "", "![plot](ablation.png)", "", "Made by `python tools/ablate_few_steps.py`.", ""])


def plot(made: list[dict[str, Any]], path: Path) -> None:
    """Captions right by number of steps, with a dot for every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for row in made:
        steps = [str(count) for count in FEW if str(count) in row["steps"]]
        shares = [row["steps"][count]["right"] for count in steps]
        line = axes.plot(steps, [mean(share) for share in shares], label=row["words"], linewidth=1)[0]
        for count, share in zip(steps, shares, strict=True):
            axes.plot([count] * len(share), share, "o", color=line.get_color(), markersize=3)
    axes.set_title("Captions right by number of steps", fontsize="medium", loc="left")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    asked = parser.parse_args()
    settings = Settings()
    if not asked.report:
        series(asked.variants.split(","), [int(seed) for seed in asked.seeds.split(",")], settings)
    made = rows()
    write_ablation(FOLDER, settings, made, plot, markdown(made, settings))


if __name__ == "__main__":
    main()
