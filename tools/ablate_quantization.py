"""What training with rounding brings over rounding afterwards, on the embedded models: tables and a plot.

    python tools/ablate_quantization.py                     # 11 rows x 3 seeds; 7 minutes a seed
    python tools/ablate_quantization.py --seeds 0 --rows kd,kd-7,kd-7-aware
    python tools/ablate_quantization.py --report            # only the tables and the plot, from the runs that are there

For each seed the tiny student is distilled by KD, and a copy of it by the consistency objective, to draw in 4 steps.
Each then trains some more: in float, or with rounding. All are asked for the same captions from the same noise. Rounded
is what a UNet computes in PyTorch as an engine of eight bits does (weights of fewer bits are harder, for comparison). A
row that is there already (same settings) is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from bench_kit.demo_models import Lessons, kept, write_ablation
from bench_kit.results import NONE, ROOT, commit, span

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json, write_json

FOLDER = ROOT / "benchmarks" / "ablation-quantization"
STUDENT, KINDS = "tiny", ("seen", "held_out")


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    kd_steps: int = 240
    few_steps: int = 200
    more_steps: int = 150
    batch_size: int = 16
    learning_rate: float = 1e-3
    more_learning_rate: float = 3e-4
    least_w: float = 2.0
    most_w: float = 4.0
    solver_steps: int = 20
    images: int = 768
    scenes: int = 20  # captions drawn, of each kind
    sampling_steps: int = 25
    guidance_scale: float = 4.0
    calibrate_images: int = 4


@dataclass(frozen=True)
class Row:
    """`model`: teacher, kd or few; `bits` of the rounded weights, None for a float row; `aware`: trained with that."""

    model: str
    bits: int | None = None
    aware: bool = False

    @property
    def words(self) -> str:
        """The row's name for people."""
        named = {"teacher": "the teacher", "kd": "student by KD", "few": "student for 4 steps"}[self.model]
        if self.bits is None:
            return f"{named}, float"
        return f"{named}, weights of {self.bits} bits, " + ("trained with rounding" if self.aware else "rounded after")


ROWS = {
    f"{model}{f'-{bits}' * bool(bits)}{'-aware' * aware}": Row(model, bits, aware)
    for model in ("teacher", "kd", "few")
    for bits in (None, 7, 4)
    for aware in (False, True)
    if (model, bits) != ("few", 4) and (not aware or (bits and model != "teacher"))
}


class Course:
    """What one seed trains, each thing when it is first asked for."""

    def __init__(self, lessons: Lessons, seed: int, settings: Settings) -> None:
        self.lessons, self.seed, self.settings = lessons, seed, settings

    def config(self, model: str, steps: int, bits: int | None = None, *, more: bool = True) -> Any:
        """The settings of a training run."""
        from sdkd.distill import TrainConfig

        own, few = self.settings, {}
        if model == "few":
            few = {
                "objective": "consistency", "guidance": (own.least_w, own.most_w), "solver_steps": own.solver_steps,
                "snr_gamma": 5.0, "feature_weight": 0.01, "caption_dropout": 0.0,
            }  # fmt: skip
        rounding = {"quantize": "int8", "weight_bits": bits, "calibrate_images": own.calibrate_images}
        return TrainConfig(
            student=STUDENT, steps=steps, batch_size=own.batch_size, precision="fp32", device="cpu", seed=self.seed,
            learning_rate=own.more_learning_rate if more else own.learning_rate, **few, **(rounding if bits else {}),
        )  # fmt: skip

    def trained(self, unet: Any, config: Any) -> Any:
        """The result of a run from a copy of a UNet."""
        from sdkd.distill import train

        return train(self.lessons.pipe, copy.deepcopy(unet), self.lessons.latents, config)

    @cache  # noqa: B019 (as long as the seed is)
    def start(self, model: str) -> Any:
        """A student before it trains some more."""
        from sdkd.students.blocks import build_student

        if model == "few":
            return self.trained(self.start("kd"), self.config(model, self.settings.few_steps, more=False)).unet
        blank = build_student(self.lessons.pipe.unet, STUDENT)
        return self.trained(blank, self.config(model, self.settings.kd_steps, more=False)).unet

    @cache  # noqa: B019
    def float_of(self, model: str) -> Any:
        """The teacher, or a student after as many more steps in float as others have with rounding."""
        if model == "teacher":
            return self.lessons.pipe.unet
        return self.trained(self.start(model), self.config(model, self.settings.more_steps)).unet

    def row(self, row: Row) -> tuple[Any, Any, Any]:
        """A UNet, what it is rounded by (None: nothing), and a calibration that was recorded of it as it is."""
        from sdkd.distill.training.card import Origin
        from sdkd.distill.training.rounding import Start

        # The teacher is recorded as its student by KD is.
        config = self.config(row.model, self.settings.more_steps, row.bits)
        done = self.trained(self.start(row.model), config) if row.aware else None
        unet = done.unet if done else self.float_of(row.model)
        if row.bits is None:
            return unet, None, None
        own = Start(self.lessons.pipe, unet, self.lessons.latents, config, Origin()).calibration()
        rounding = done.calibration if done else own
        return unet, (rounding, config.scheme), own


class Exam:
    """Captions and noise that are the same for all, and the teacher's images of them."""

    def __init__(self, lessons: Lessons, settings: Settings) -> None:
        self.lessons, self.settings = lessons, settings
        self.reference = self.drawn(lessons.pipe.unet, "teacher")

    def drawn(self, unet: Any, model: str) -> dict[str, list[Any]]:
        """Images of all captions, by kind; of a student for few steps in 4."""
        from sdkd.distill import TrainConfig
        from sdkd.distill.training.drawing import result_scheduler
        from sdkd.toyworld.reader import draw

        own, pipe = self.settings, self.lessons.drawn_by(unet)
        asked = (own.sampling_steps, own.guidance_scale)
        if model == "few":
            config = TrainConfig(objective="consistency", solver_steps=own.solver_steps)
            pipe.scheduler, asked = result_scheduler(pipe.scheduler, config, None), (4, 1.0)
        return {kind: draw(pipe, self.lessons.scenes[kind], *asked, seed=0, batch_size=30) for kind in KINDS}

    def marks(self, row: Row, course: Course) -> dict[str, Any]:
        """Captions right, PSNR of images to the teacher's and to those of the same weights in float, and errors of the
        noise prediction by timestep, against the same weights in float.
        """
        from sdkd.distill.training.rounding import rounded
        from sdkd.quantization.sensitivity import prediction_error
        from sdkd.toyworld.reader import judge_captions
        from sdkd.toyworld.scenes import caption

        unet, rounding, own = course.row(row)
        plain = self.drawn(unet, row.model) if rounding else None
        with rounded(unet, *rounding) if rounding else contextlib.nullcontext():
            images, errors = self.drawn(unet, row.model), prediction_error(unet, own.calls if own else ())
        captions = {kind: [caption(scene) for scene in self.lessons.scenes[kind]] for kind in KINDS}
        return {
            "right": {kind: judge_captions(images[kind], captions[kind]) for kind in KINDS},
            "teacher_psnr_db": likeness(images, self.reference),
            "float_psnr_db": likeness(images, plain) if plain else None,
            "prediction": [{"timestep": at, "relative": error} for at, error in errors] if rounding else None,
        }


def likeness(images: Mapping[str, list[Any]], others: Mapping[str, list[Any]]) -> list[float]:
    """PSNR of each image to its fellow, in dB."""
    from sdkd.compare.measure.quality import image_likeness

    pairs = [pair for kind in KINDS for pair in zip(images[kind], others[kind], strict=True)]
    return [image_likeness(*pair).counted_db for pair in pairs]


def series(names: list[str], seeds: list[int], settings: Settings) -> None:
    """All rows that are not there yet, seed by seed; the teacher's are the same for all."""
    lessons: Lessons | None = None
    for seed in seeds:
        paths = {
            name: FOLDER / "runs" / f"{name}-{seed}.json"
            for name in names if ROWS[name].model != "teacher" or seed == seeds[0]
        }  # fmt: skip
        wanted = {name: path for name, path in paths.items() if not kept(path, settings)}
        if not wanted:
            continue
        if lessons is None:
            lessons = Lessons(settings.images, settings.scenes)
            exam = Exam(lessons, settings)
        course = Course(lessons, seed, settings)
        for name, path in wanted.items():
            marks = exam.marks(ROWS[name], course)
            about = {"row": name, "seed": seed, "settings": asdict(settings), "commit": commit()}
            write_json(path, {**about, "marks": marks})
            print(f"{ROWS[name].words}, seed {seed}: captions right {right(marks):.0%}", flush=True)


def right(marks: Mapping[str, Any]) -> float:
    """Mean share of the attributes that are right, over all captions."""
    return mean(share for kind in KINDS for share in marks["right"][kind].values())


def figures(marks: Mapping[str, Any]) -> dict[str, float]:
    """A run's numbers: captions right, mean PSNR in dB, the largest error of a prediction."""
    found = {"right": right(marks), "teacher_psnr_db": mean(marks["teacher_psnr_db"])}
    if marks["prediction"]:
        found["float_psnr_db"] = mean(marks["float_psnr_db"])
        found["worst"] = max(call["relative"] for call in marks["prediction"])
    return found


def rows() -> list[dict[str, Any]]:
    """One row for each row of the table: every seed's figures, and the prediction's error by timestep, its mean."""
    runs = [read_json(path) for path in sorted((FOLDER / "runs").glob("*.json"))]
    made = []
    for name, row in ROWS.items():
        own = [run for run in runs if run["row"] == name]
        if not own:
            continue
        each = [figures(run["marks"]) for run in own]
        if name == "teacher":  # its own images
            each = [{key: one[key] for key in one if key != "teacher_psnr_db"} for one in each]
        every = zip(*(run["marks"]["prediction"] or () for run in own), strict=True)
        calls = sorted(every, key=lambda call: -call[0]["timestep"])
        made.append(
            {
                "row": name, "words": row.words, "seeds": [run["seed"] for run in own],
                **{key: [one[key] for one in each] for key in each[0]},
                "timesteps": [call[0]["timestep"] for call in calls],
                "relative": [mean(one["relative"] for one in call) for call in calls],
            }
        )  # fmt: skip
    return made


HEADS: dict[str, tuple[str, str]] = {
    "right": ("captions right", ".0%"),
    "teacher_psnr_db": ("PSNR to the teacher, dB", ".1f"),
    "float_psnr_db": ("PSNR to the same weights in float, dB", ".1f"),
    "worst": ("largest error of a prediction", ".1%"),
}

GAINS = (("right", 100.0, "points of captions right"), ("teacher_psnr_db", 1.0, "dB to the teacher"))


def verdicts(made: list[dict[str, Any]]) -> list[str]:
    """What training with rounding brings, in a sentence for each pair of rows that is there."""
    found = {row["row"]: row for row in made}
    said = []
    for name, row in ROWS.items():
        before, after = found.get(name.removesuffix("-aware")), found.get(name)
        if not row.aware or before is None or after is None:
            continue
        seeds = [seed for seed in after["seeds"] if seed in before["seeds"]]
        words = []
        for key, factor, unit in GAINS:
            of = [dict(zip(one["seeds"], one[key], strict=True)) for one in (before, after)]
            gains = [factor * (of[1][seed] - of[0][seed]) for seed in seeds]
            same = min(gains) > 0 or max(gains) < 0
            words.append(f"{mean(gains):+.2f} {unit}{'' if same else ' (not of one sign with every seed)'}")
        said.append(f"- {row.words}, against rounded after: {', '.join(words)}.")
    return said


def markdown(made: list[dict[str, Any]], settings: Settings) -> str:
    """The tables for people."""
    lines = [
        "# What training with rounding brings (embedded models)",
        "",
        f"The tiny student after {settings.kd_steps} steps of KD; for 4 steps after {settings.few_steps} more of the "
        f"consistency objective. Each then trains {settings.more_steps} steps more, in float or with rounding, with "
        f"{settings.batch_size} images each and learning rate {settings.more_learning_rate:g}, on a CPU. Rounded: "
        "8-bit activations, and what convolutions give, as ONNX Runtime has it, computed in PyTorch; weights of 7 bits "
        "are what CPUs without VNNI get, 4 bits no engine has: they show what is left when rounding is coarse. The "
        "float rows and those that are rounded after have the same weights. Mean over seeds, and the range; "
        f"{2 * settings.scenes} captions, drawn with guidance {settings.guidance_scale:g} in {settings.sampling_steps} "
        "steps, or in 4 without. Errors are L2 norms of a noise prediction's difference over its own, against the same "
        "weights in float, at the worst timestep.",
        "",
    ]
    cells = [
        [row["words"], str(len(row["seeds"])),
         *(span(row[key], form) if key in row else NONE for key, (_, form) in HEADS.items())]
        for row in made
    ]  # fmt: skip
    lines += markdown_table(("", "seeds", *(head for head, _ in HEADS.values())), cells, left=1)
    lines += ["", "## What it brings", "", *verdicts(made), "", "## Error by timestep", ""]
    for model in dict.fromkeys(row.model for row in ROWS.values()):
        own = [row for row in made if ROWS[row["row"]].model == model and row["timesteps"]]
        if own:
            heads = ("", *(f"{at:.0f}" for at in own[0]["timesteps"]))
            errors = [[row["words"], *(f"{error:.1%}" for error in row["relative"])] for row in own]
            lines += [*markdown_table(heads, errors, left=1), ""]
    return "\n".join([*lines, "![plot](ablation.png)", "", "Made by `python tools/ablate_quantization.py`.", ""])


def plot(made: list[dict[str, Any]], path: Path) -> None:
    """PSNR to the teacher of every row, with a dot for every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.35 * len(made) + 1), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in reversed(made) if "teacher_psnr_db" in row]
    for place, row in enumerate(shown):
        values = row["teacher_psnr_db"]
        axes.barh(place, mean(values), color="tab:orange" if ROWS[row["row"]].aware else "tab:blue", alpha=0.5)
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(shown)), [row["words"] for row in shown], fontsize="small")
    axes.set_title("PSNR to the teacher's images, dB", fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--report", action="store_true", help="only the tables and the plot")
    asked = parser.parse_args()
    settings = Settings()
    if not asked.report:
        series(asked.rows.split(","), [int(seed) for seed in asked.seeds.split(",")], settings)
    made = rows()
    write_ablation(FOLDER, settings, made, plot, markdown(made, settings))


if __name__ == "__main__":
    main()
