"""Means of what a run measures, written as JSON lines, and sent to TensorBoard or Weights & Biases by choice."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from sdkd.core.documents import parse_json, read_regular
from sdkd.core.files import write_bytes
from sdkd.core.schema import problem
from sdkd.errors import InputError

LOG = "training.jsonl"
Send = Callable[[Mapping[str, float], int], None]
"""Called with a record and its step: a tracker."""


class LogState(TypedDict):
    """What was counted since the last record, as JSON."""

    sums: dict[str, float]
    counts: dict[str, int]
    images: int


class TrainingLog:
    """Sums values on their device and writes their means every few steps, so that a GPU seldom has to wait.

    A record holds: step, each loss, grad_norm (before clipping; not of steps that fp16 skipped), lr, images_per_second,
    seconds since the start, and what else `write` is given. A value that is not finite is left out: JSON has none, and
    the trainer stops where one matters. `path` is a file to append to; from a resumed run's file, records after `step`
    are cut.
    """

    def __init__(self, path: Path | None = None, *, step: int = 0, send: Send | None = None) -> None:
        self._path, self._send = path, send
        self.history: list[dict[str, float]] = read_log(path, step) if path is not None and step else []
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        before = self.history[-1]["seconds"] if self.history else 0.0
        self._last = time.perf_counter()
        self._start = self._last - before
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, "".join(_line(record) for record in self.history).encode())

    def add(self, values: Mapping[str, torch.Tensor], images: int) -> None:
        """Count one optimizer step: scalar tensors by name, and how many images it took."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)).to(value.device) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += images

    def state(self) -> LogState:
        """For `restore`."""
        sums = {name: number for name, value in self._sums.items() if math.isfinite(number := float(value))}
        return {"sums": sums, "counts": {name: self._counts[name] for name in sums}, "images": self._images}

    def restore(self, state: LogState) -> None:
        """Go on counting where `state` was taken, so that a resumed run writes the same records."""
        self._sums = {name: torch.tensor(value) for name, value in state["sums"].items()}
        self._counts, self._images = dict(state["counts"]), state["images"]

    def means(self) -> dict[str, torch.Tensor]:
        """The means since the last record, still on their device."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}

    def write(
        self,
        step: int,
        lr: float,
        *,
        means: Mapping[str, torch.Tensor] | None = None,
        others: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write a record of the means since the last one.

        `means` replaces this process's own (by the mean over all); `others` are added as they are.
        """
        now = time.perf_counter()
        values: dict[str, Any] = {
            "step": step,
            **(means or self.means()),
            "lr": lr,
            "images_per_second": self._images / max(now - self._last, 1e-9),
            "seconds": now - self._start,
            **(others or {}),
        }
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        record = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._sums, self._counts, self._images, self._last = {}, {}, 0, now
        self.history.append(record)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(_line(record))
        if self._send is not None:
            self._send(record, step)
        return record

    @property
    def seconds(self) -> float:
        """Time since the last record."""
        return time.perf_counter() - self._last


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


class _Record(TypedDict):
    step: int
    lr: float
    images_per_second: float
    seconds: float


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, float]]:
    """Records of a training.jsonl up to `last_step`, none without a file; a last line that was cut short by a crash is
    left out. InputError for any other line that is no record.
    """
    records: list[dict[str, float]] = []
    lines = read_regular(path, math.inf).rstrip(b"\n").split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line, dict[str, float], strict=True)
            if wrong := problem(record, _Record):
                raise ValueError(wrong)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"line {number} of {str(path)!r} is no record of a run ({error}): restore the file, or move it away"
            ) from None
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records
