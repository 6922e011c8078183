"""Means of what a run measures, written as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdkd.errors import TrainingError


class TrainingLog:
    """Sums values on their device and writes their means every few steps, so that a GPU seldom has to wait.

    A record holds: step, each loss, grad_norm (before clipping), lr, images_per_second, seconds since the start.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.history: list[dict[str, float]] = []
        self._path = path
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = self._images = 0
        self._start = self._last = time.perf_counter()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")

    def add(self, values: Mapping[str, torch.Tensor], images: int) -> None:
        """Count one optimizer step: scalar tensors by name, and how many images it took."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        self._steps += 1
        self._images += images

    def write(self, step: int, lr: float) -> dict[str, float]:
        """Write the means since the last record; TrainingError when a loss is not finite."""
        now = time.perf_counter()
        record: dict[str, float] = {"step": step}
        record |= {name: float(value) / self._steps for name, value in self._sums.items()}
        record |= {
            "lr": lr,
            "images_per_second": self._images / max(now - self._last, 1e-9),
            "seconds": now - self._start,
        }
        endless = {name for name, value in record.items() if not math.isfinite(value)}
        if bad := sorted(name for name in endless if name.startswith("loss/")):
            raise TrainingError(
                f"{', '.join(bad)} became NaN or infinite in steps {step - self._steps + 1} to {step}, so training was "
                "stopped and nothing was saved: lower --learning-rate, or use --precision bf16 instead of fp16"
            )
        # An infinite gradient is usual in fp16: GradScaler skips that step. JSON has no word for it, so it is left out.
        record = {name: value for name, value in record.items() if name not in endless}
        self._sums, self._steps, self._images, self._last = {}, 0, 0, now
        self._append(record)
        return record

    def _append(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, allow_nan=False) + "\n")
