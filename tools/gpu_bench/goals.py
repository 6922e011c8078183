"""What a data-centre GPU should reach, as data, and what a report says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
EAGER = "eager, channels_last"
ENGINE_WAYS = ("tensorrt", "onnxruntime")  # how the way of an engine begins
MICRO = 1e6


@dataclass(frozen=True)
class Goal:
    """One goal: in words, what is wanted, the value (None: not measured), whether it was met, and what is missing."""

    words: str
    wanted: str
    value: float | None
    unit: str
    met: bool
    gap: str

    @property
    def measured(self) -> str:
        """The value in words."""
        return "not measured" if self.value is None else f"{self.value:,.2f}{self.unit}"


def _steps(found: Json, label: str) -> list[Json]:
    """UNet steps of a model at the report's first shape, LoRA's own rows left out."""
    batch, size = found["settings"]["batches"][0], found["settings"]["sizes"][0]
    return [row for row in _rows(found, label, "UNet step") if (row["batch"], row["size"]) == (batch, size)]


def _rows(found: Json, label: str, what: str) -> Iterator[Json]:
    for name, piece in found["pieces"].items():
        kind, _, own = name.partition("/")
        if own == label and kind != "lora":
            yield from (row for row in piece["rows"] if row["what"] == what)


def _best(rows: list[Json]) -> float | None:
    return min((row["median_s"] for row in rows if row["way"].startswith(ENGINE_WAYS)), default=None)


def _eager(rows: list[Json]) -> float | None:
    return next((row["median_s"] for row in rows if row["way"] == EAGER), None)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def _tiny_over_eager(found: Json) -> float | None:
    rows = _steps(found, "tiny")
    return _ratio(_eager(rows), _best(rows))


def _tiny_over_teacher(found: Json) -> float | None:
    return _ratio(_eager(_steps(found, "teacher")), _best(_steps(found, "tiny")))


def _share_at_most(found: Json) -> float | None:
    """The best engine's share of the matrix rate at the report's largest batch."""
    batch = max(found["settings"]["batches"])
    rows = [row for row in _rows(found, "tiny", "UNet step") if row["batch"] == batch and "limit" in row]
    return max((row["limit"]["matrix_share"] for row in rows if row["way"].startswith(ENGINE_WAYS)), default=None)


def _overhead(found: Json) -> float | None:
    """Microseconds that the runtime adds to the library's own replay, at most over the targets."""
    added = []
    steps = {row["way"]: row["median_s"] for row in _steps(found, "tiny")}
    for row in _rows(found, "tiny", "bare"):
        target, _, call = row["way"].partition(", ")
        whole = steps.get(f"{target}, CUDA graphs")
        if call == "bare replay" and whole:
            added.append((whole - row["median_s"]) * MICRO)
    return max(added, default=None)


def _train(found: Json, key: Callable[[Json, Json], float | None]) -> float | None:
    """The smallest ratio of our step to the reference's, over batches, for the small student."""
    rows = list(_rows(found, "small", "training step"))
    ratios = []
    for row in rows:
        base = next((one for one in rows if one["batch"] == row["batch"] and one["way"] == "reference"), None)
        if row["way"] == "Trainer.step" and base and (value := key(base, row)) is not None:
            ratios.append(value)
    return min(ratios, default=None)


GOALS: tuple[tuple[str, float, str, Callable[[Json], float | None], bool], ...] = (
    ("UNet step of tiny on its best target, over eager", 2.5, "x", _tiny_over_eager, True),
    ("teacher in eager PyTorch to tiny on its best target", 6.0, "x", _tiny_over_teacher, True),
    ("share of the matrix rate at the largest batch, tiny", 0.5, "", _share_at_most, True),
    ("what the runtime adds to a step", 50.0, " us", _overhead, False),
    ("training of small, images per second over the reference", 2.5, "x",
     lambda found: _train(found, lambda base, own: _ratio(base["median_s"], own["median_s"])), True),
    ("memory of the reference over ours, small", 2.0, "x",
     lambda found: _train(found, lambda base, own: _ratio(base["memory_gb"], own["memory_gb"])), True),
)  # fmt: skip


def goals(found: Json) -> list[Goal]:
    """Every goal with what the report says of it."""
    every = []
    for words, wanted, unit, measure, at_least in GOALS:
        value = measure(found)
        met = value is not None and (value >= wanted if at_least else value <= wanted)
        gap = "" if value is None else f"{abs(value - wanted):,.2f}{unit} {'short' if at_least else 'too much'}"
        text = f"{'at least' if at_least else 'at most'} {wanted:g}{unit}"
        every.append(Goal(words, text, value, unit, met, gap))
    return every
