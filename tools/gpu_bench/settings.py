"""What a report measures and in which order: models, sizes, and pieces as data. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_kit.runner import Piece

from sdkd.errors import InputError

FULL_SIZE = {"tiny": "random:sd15-tiny", "teacher": "random:sd15", "small": "random:sd15-small"}
TENSORRT = ("tensorrt", "tensorrt-rtx")
IN_TORCH = ("eager", "compile")
INDUCTOR = "inductor"
TARGETS = (*IN_TORCH, INDUCTOR, *TENSORRT, "onnxruntime")  # what needs no package beside torch comes first
SLOW_TO_OPEN = ("compile", INDUCTOR)  # both compile for each size, with every kernel timed
TEACHER = "teacher"  # the label of the model that students are trained from
# What is said of figures that no GPU has given yet: targets of comparisons, and kinds of pieces.
FIGURES = {
    "eager": "teacher and students in eager PyTorch",
    "compile": "the same with torch.compile",
    "inductor": "the same as packages of PyTorch's own compiler",
    "tensorrt": "the same as TensorRT engines",
    "tensorrt-rtx": "the same as TensorRT-RTX engines",
    "onnxruntime": "the same on ONNX Runtime's CUDA",
    "teacher-to-student": "the eager teacher and a student's engines",
    "train": "a distillation step, the reference's and ours",
    "overhead": "what the runtime adds to the library's own call",
    "lora": "a LoRA by refit and by rebuilding",
}
# By kind: seconds without which a piece is not begun (engines are built in it, too), and after which it is stopped.
SECONDS = {
    "doctor": (60.0, 150.0), "compare": (200.0, 480.0), "teacher-to-student": (100.0, 300.0), "train": (90.0, 225.0),
    "overhead": (45.0, 120.0), "lora": (90.0, 300.0),
}  # fmt: skip
DRY_SHARE = 0.1  # of the costs, with the models of a dry run


@dataclass(frozen=True)
class Settings:
    """What all pieces of one report share; travels to their processes as JSON.

    `models`: label -> what sdkd calls a model, the first one measured most; `sizes` in pixels and `batches` in images
    per call, the first of each for what needs one; `seconds` of timed UNet calls for each subject.
    """

    models: Mapping[str, str] = field(default_factory=lambda: dict(FULL_SIZE))
    device: str = "cuda"
    precision: str = "fp16"
    train_precision: str = "bf16"
    sizes: tuple[int, ...] = (512, 768)
    batches: tuple[int, ...] = (1, 8)
    train_size: int = 512
    train_batches: tuple[int, ...] = (8, 16, 32)
    train_rounds: int = 5
    steps: int = 25
    seconds: float = 1.0
    runs: int = 30
    targets: tuple[str, ...] = TARGETS
    work: str = "artifacts/gpu-report"

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Settings:
        """The inverse of `dataclasses.asdict` and JSON."""
        return Settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})

    @staticmethod
    def of(asked: argparse.Namespace) -> Settings:
        """What the command line asks for; InputError for models that cannot be read."""
        given: dict[str, Any] = {"work": str(asked.work), "steps": asked.steps, "seconds": asked.seconds}
        if asked.models:
            pairs = [word.partition("=") for word in asked.models.split(",")]
            if not all(label and model for label, _, model in pairs):
                raise InputError(f"models {asked.models!r} are not understood: give LABEL=MODEL,LABEL=MODEL")
            given["models"] = {label: model for label, _, model in pairs}
        for name in ("sizes", "batches", "train_batches"):
            words = getattr(asked, name)
            given[name] = tuple(int(word) for word in words.split(",")) if words else None
        given["targets"] = tuple(asked.targets.split(",")) if asked.targets else None
        if unknown := sorted(set(given["targets"] or ()) - set(TARGETS)):
            raise InputError(f"target {unknown[0]!r} is unknown here: choose from {', '.join(TARGETS)}")
        given = {name: value for name, value in given.items() if value is not None}
        return dry(given) if asked.dry_run else Settings(**given)

    def public(self) -> dict[str, Any]:
        """For a report, without this machine's folders: models by their last name."""
        models = {label: model if ":" in model else Path(model).name for label, model in self.models.items()}
        return {name: value for name, value in asdict(self).items() if name != "work"} | {"models": models}

    @property
    def engines(self) -> tuple[str, ...]:
        """The targets that need an engine."""
        return tuple(target for target in self.targets if target not in IN_TORCH)


def dry(settings: Mapping[str, Any]) -> Settings:
    """Settings of a run without a GPU: the same pieces on a CPU, with tiny models, few calls, and no compiler."""
    small: dict[str, Any] = {
        "models": {TEACHER: "demo"}, "device": "cpu", "precision": "fp32", "train_precision": "fp32", "sizes": (64,),
        "batches": (1, 2), "train_size": 64, "train_batches": (2,), "train_rounds": 3, "steps": 2, "seconds": 0.0,
        "runs": 3, "targets": tuple(target for target in TARGETS if target != "compile"),
    }  # fmt: skip
    return Settings(**(small | dict(settings)))


def all_pieces(settings: Settings) -> list[Piece]:
    """Every piece of a report, the most telling first: what runs at all, then the first model on everything."""
    first, *others = settings.models
    size, batch = settings.sizes[0], settings.batches[0]
    trained = TEACHER in settings.models
    every = {first: settings.targets}
    short = {first: tuple(target for target in settings.targets if target not in SLOW_TO_OPEN)}

    def compared(name: str, subjects: Mapping[str, Sequence[str]], size: int = size, batch: int = batch) -> Piece:
        return _piece(settings, name, "comparison", subjects=subjects, size=size, batch=batch)

    def student(name: str) -> list[Piece]:
        return [_piece(settings, f"train/{name}", "train", student=name)] if trained else []

    both = {TEACHER: ("eager",), first: settings.engines}
    return [
        _piece(settings, "doctor", "doctor"),
        compared(f"compare/{first}", every),
        *([compared("teacher-to-student", both)] if trained and first != TEACHER else []),
        *student("small"),
        _piece(settings, f"overhead/{first}", "overhead", model=first),
        *(compared(f"compare/{first}-batch{count}", short, batch=count) for count in settings.batches[1:]),
        *(compared(f"compare/{first}@{side}", short, size=side) for side in settings.sizes[1:]),
        *student("tiny"),
        *(compared(f"compare/{label}", {label: settings.targets}) for label in others),
        _piece(settings, f"lora/{first}", "lora", model=first),  # last: it builds other engines in place of the first's
    ]


def _piece(settings: Settings, name: str, function: str, **given: Any) -> Piece:
    least, most = SECONDS[name.partition("/")[0]]
    cost = least * (DRY_SHARE if settings.device == "cpu" else 1.0)
    return Piece(name, f"gpu_bench.pieces:{function}", {"given": asdict(settings), **given}, cost, most)


def chosen(settings: Settings, words: str) -> list[Piece]:
    """The pieces that are named, by kind or whole name, in their order; all for empty words. InputError otherwise."""
    every = all_pieces(settings)
    known = dict.fromkeys([*(piece.kind for piece in every), *(piece.name for piece in every)])
    names = [word for word in words.replace(" ", "").split(",") if word]
    if unknown := sorted(set(names) - set(known)):
        raise InputError(f"piece {unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return [piece for piece in every if not names or {piece.name, piece.kind} & set(names)]
