"""What a report measures and in which order: models, sizes, and pieces as data. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sdkd.errors import InputError
from sdkd.targets.registry import TARGETS

FULL_SIZE = {"tiny": "random:sd15-tiny", "teacher": "random:sd15", "small": "random:sd15-small"}
TENSORRT = ("tensorrt-rtx", "tensorrt")
ENGINES = (*TENSORRT, "onnxruntime")
TEACHER = "teacher"  # the label of the model that students are trained from
DEMO = {TEACHER: "demo"}


@dataclass(frozen=True)
class Piece:
    """One part of a report, run in a process of its own: its kind, the model it measures, and what runs it."""

    kind: str
    model: str  # empty: of no model
    function: str  # "module:name" in this package

    @property
    def name(self) -> str:
        """How it is called: `eager/tiny`, `doctor`."""
        return f"{self.kind}/{self.model}" if self.model else self.kind


FUNCTIONS = {
    "doctor": "pieces:doctor",
    "ceilings": "pieces:ceilings",
    "eager": "unets:eager",
    "compile": "unets:compiled",
    **dict.fromkeys(ENGINES, "unets:engine"),
    "vae": "parts:vae",
    "images": "images:images",
    "lora": "weights:lora",
    "train": "training:train",
}
# The most telling first: what runs at all, then the first model on everything, then the others. Numbers are places in
# the settings' models, names those of students to train.
ORDER: tuple[tuple[str, int | str | None], ...] = (
    ("doctor", None), ("ceilings", None), ("eager", 0), ("eager", 1), ("tensorrt-rtx", 0), ("tensorrt", 0),
    ("train", "small"), ("onnxruntime", 0), ("train", "tiny"), ("images", 0), ("eager", 2), ("vae", 0), ("lora", 0),
    ("compile", 0), ("tensorrt-rtx", 1), ("tensorrt", 1), ("tensorrt-rtx", 2), ("tensorrt", 2), ("images", 1),
    ("images", 2), ("compile", 1), ("compile", 2), ("onnxruntime", 1), ("onnxruntime", 2),
)  # fmt: skip
# Seconds that a piece of each kind usually takes in full size: with fewer left it is not begun.
COSTS = {
    "doctor": 60.0, "ceilings": 15.0, "eager": 30.0, "train": 90.0, "onnxruntime": 120.0, "tensorrt-rtx": 120.0,
    "tensorrt": 240.0, "images": 80.0, "vae": 45.0, "lora": 60.0, "compile": 240.0,
}  # fmt: skip
CAPS = {"compile": 300.0}  # seconds after which a piece is stopped, where that is not CAP_FACTOR times its cost
CAP_FACTOR = 2.5
DRY_SHARE = 0.1  # of the costs, with the models of a dry run


def cost(kind: str, settings: Settings) -> float:
    """Seconds that must be left for a piece to be begun."""
    return COSTS[kind] * (DRY_SHARE if settings.device == "cpu" else 1.0)


def cap(kind: str) -> float:
    """Seconds after which a piece is stopped."""
    return CAPS.get(kind, CAP_FACTOR * COSTS[kind])


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

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Settings:
        """The inverse of `to_json`."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        return Settings(**values)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Batch and size of every UNet row: all batches at the first size, the first batch at the other sizes."""
        return [(batch, self.sizes[0]) for batch in self.batches] + [(self.batches[0], size) for size in self.sizes[1:]]


def dry(settings: Mapping[str, Any]) -> Settings:
    """Settings of a run without a GPU: the same pieces on a CPU, with tiny models, few calls, and no compiler."""
    small: dict[str, Any] = {
        "models": DEMO, "device": "cpu", "precision": "fp32", "train_precision": "fp32", "sizes": (64, 128),
        "batches": (2, 4), "train_size": 64, "train_batches": (2,), "train_rounds": 3, "steps": 2, "seconds": 0.05,
        "runs": 3, "compile_options": ({"backend": "eager"},),
    }  # fmt: skip
    return Settings(**(small | {name: value for name, value in settings.items() if value is not None}))


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
    return [
        Piece(kind, model, FUNCTIONS[kind]) for kind, model in wanted if kind not in TARGETS or kind in settings.targets
    ]


def chosen(settings: Settings, words: str) -> list[Piece]:
    """The pieces that are named, by kind or whole name, in their order; all for empty words. InputError otherwise."""
    every = all_pieces(settings)
    names = [word for word in words.replace(" ", "").split(",") if word]
    if unknown := sorted(set(names) - set(_names(every))):
        raise InputError(f"piece {unknown[0]!r} is unknown: choose from {', '.join(dict.fromkeys(_names(every)))}")
    return [piece for piece in every if not names or {piece.name, piece.kind} & set(names)]


def _names(pieces: Sequence[Piece]) -> Iterator[str]:
    yield from (piece.kind for piece in pieces)
    yield from (piece.name for piece in pieces)
