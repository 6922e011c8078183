"""What a report measures and in which order: models, sizes, and pieces as data. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_kit.runner import Piece

from sdkd.errors import InputError
from sdkd.targets.registry import TARGETS

FULL_SIZE = {"tiny": "random:sd15-tiny", "teacher": "random:sd15", "small": "random:sd15-small"}
TENSORRT = ("tensorrt-rtx", "tensorrt")
ENGINES = (*TENSORRT, "onnxruntime")
TEACHER = "teacher"  # the label of the model that students are trained from
# The most telling first: what runs at all, then the first model on everything, then the others. Numbers are places in
# the settings' models, names those of students to train.
ORDER: tuple[tuple[str, int | str | None], ...] = (
    ("doctor", None), ("ceilings", None), ("eager", 0), ("eager", 1), ("tensorrt-rtx", 0), ("tensorrt", 0),
    ("train", "small"), ("onnxruntime", 0), ("train", "tiny"), ("images", 0), ("eager", 2), ("vae", 0), ("lora", 0),
    ("compile", 0), ("tensorrt-rtx", 1), ("tensorrt", 1), ("tensorrt-rtx", 2), ("tensorrt", 2), ("images", 1),
    ("images", 2), ("compile", 1), ("compile", 2), ("onnxruntime", 1), ("onnxruntime", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Pieces of a kind: what runs them, what they say, and the seconds that one usually takes in full size."""

    function: str
    cost: float  # with fewer left it is not begun
    words: str = ""  # empty: no figures

    @property
    def cap(self) -> float:
        """Seconds after which a piece is stopped."""
        return 300.0 if self.function == "unets:compiled" else 2.5 * self.cost


KINDS = {
    "doctor": Kind("bench:doctor", 60.0),
    "eager": Kind("unets:eager", 30.0, "teacher and students in eager PyTorch: UNet steps"),
    "tensorrt": Kind("unets:engine", 240.0, "the same as TensorRT engines"),
    "tensorrt-rtx": Kind("unets:engine", 120.0, "the same as TensorRT-RTX engines"),
    "onnxruntime": Kind("unets:engine", 120.0, "the same on ONNX Runtime's CUDA"),
    "compile": Kind("unets:compiled", 240.0, "the same with torch.compile"),
    "images": Kind("wholes:images", 80.0, "whole images of 25 steps"),
    "vae": Kind("wholes:vae", 45.0, "decoding by the VAE"),
    "lora": Kind("changes:lora", 60.0, "a LoRA by refit and by rebuilding"),
    "train": Kind("changes:train", 90.0, "a distillation step, the reference's and ours"),
    "ceilings": Kind("bench:ceilings", 15.0, "what the GPU can do at most"),
}
DRY_SHARE = 0.1  # of the costs, with the models of a dry run


@dataclass(frozen=True)
class Settings:
    """What all pieces of one report share; travels to their processes as JSON.

    `models`: label -> what sdkd calls a model; `sizes` in pixels and `batches` in latents per UNet call, the first of
    each for the rows that need one; `seconds` of timed calls for each row.
    """

    models: Mapping[str, str] = field(default_factory=lambda: dict(FULL_SIZE))
    device: str = "cuda"
    precision: str = "fp16"
    train_precision: str = "bf16"
    sizes: tuple[int, ...] = (512, 768)
    batches: tuple[int, ...] = (2, 8, 16)
    train_size: int = 512
    train_batches: tuple[int, ...] = (8, 16, 32)
    train_rounds: int = 5
    steps: int = 25
    seconds: float = 1.5
    runs: int = 50
    targets: tuple[str, ...] = ENGINES
    compile_options: tuple[Mapping[str, Any], ...] = ({"mode": "max-autotune"}, {"mode": "max-autotune-no-cudagraphs"})
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
        given = {name: value for name, value in given.items() if value is not None}
        return dry(given) if asked.dry_run else Settings(**given)

    def public(self) -> dict[str, Any]:
        """For a report, without this machine's folders: models by their last name."""
        models = {label: model if ":" in model else Path(model).name for label, model in self.models.items()}
        return {name: value for name, value in asdict(self).items() if name != "work"} | {"models": models}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Batch and size of every UNet row: all batches at the first size, the first batch at the other sizes."""
        return [(batch, self.sizes[0]) for batch in self.batches] + [(self.batches[0], size) for size in self.sizes[1:]]


def dry(settings: Mapping[str, Any]) -> Settings:
    """Settings of a run without a GPU: the same pieces on a CPU, with tiny models, few calls, and no compiler."""
    small: dict[str, Any] = {
        "models": {TEACHER: "demo"}, "device": "cpu", "precision": "fp32", "train_precision": "fp32",
        "sizes": (64, 128), "batches": (2, 4), "train_size": 64, "train_batches": (2,), "train_rounds": 3, "steps": 2,
        "seconds": 0.05, "runs": 3, "compile_options": ({"backend": "eager"},),
    }  # fmt: skip
    return Settings(**(small | dict(settings)))


def all_pieces(settings: Settings) -> list[Piece]:
    """Every piece of a report in order, for the models and targets that it has."""
    labels = dict(enumerate(settings.models))
    wanted: list[tuple[str, str]] = []
    for kind, place in ORDER:
        if isinstance(place, int):
            wanted += [(kind, labels[place])] if place in labels else []
        elif place is None or TEACHER in settings.models:
            wanted.append((kind, place or ""))
    later = ("eager", *ENGINES, "images", "compile")
    wanted += [(kind, labels[place]) for place in sorted(labels)[3:] for kind in later]
    return [_piece(settings, *one) for one in wanted if one[0] not in TARGETS or one[0] in settings.targets]


def _piece(settings: Settings, kind: str, model: str) -> Piece:
    name, cost = (
        f"{kind}/{model}" if model else kind,
        KINDS[kind].cost * (DRY_SHARE if settings.device == "cpu" else 1.0),
    )
    given = {"kind": kind, "model": model, "settings": asdict(settings)}
    return Piece(name, "gpu_bench.bench:run", given, cost, KINDS[kind].cap)


def chosen(settings: Settings, words: str) -> list[Piece]:
    """The pieces that are named, by kind or whole name, in their order; all for empty words. InputError otherwise."""
    every = all_pieces(settings)
    known = dict.fromkeys([*(piece.kind for piece in every), *(piece.name for piece in every)])
    names: Sequence[str] = [word for word in words.replace(" ", "").split(",") if word]
    if unknown := sorted(set(names) - set(known)):
        raise InputError(f"piece {unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return [piece for piece in every if not names or {piece.name, piece.kind} & set(names)]
