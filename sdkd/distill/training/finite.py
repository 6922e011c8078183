"""Numbers that are not finite: where they stop a run, and which ones fp16 may meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sdkd.errors import TrainingError

Named = Sequence[tuple[int, int, str]]  # of each sample: its index, timestep and caption
_SHOWN = 16  # samples that a message names
_CAPTION = 40  # characters of a caption
_IN_A_ROW = 20  # skipped steps: the scaler's scale, halved by each, is then a millionth of what it was


class NotFiniteError(TrainingError):
    """A loss, a gradient or a weight is NaN or infinite; nothing of that step was kept."""


@dataclass
class SkippedSteps:
    """Steps that fp16's loss scaling skipped, as it does where a gradient overflows: all of a run, and in a row."""

    total: int = 0
    row: int = 0

    def count(self, step: int, named: Named) -> None:
        """Count one; NotFiniteError when there were too many without a finite one between them."""
        self.total, self.row = self.total + 1, self.row + 1
        if self.row >= _IN_A_ROW:
            raise NotFiniteError(
                f"the gradient was NaN or infinite in {self.row} steps of fp16 in a row, the last one "
                f"{_where(step, named)}"
            )

    def end_row(self) -> None:
        """A step was done."""
        self.row = 0


def not_finite(step: int, values: Mapping[str, torch.Tensor], named: Named) -> NotFiniteError:
    """The error for a step whose loss or gradient norm is not finite; it names the step's images."""
    bad = {name: float(value) for name, value in values.items() if not torch.isfinite(value)}
    shown = ", ".join(f"{name} {value}" for name, value in sorted(bad.items()))
    return NotFiniteError(f"{shown} {_where(step, named)}")


def check_weights(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """NotFiniteError unless all weights, averages and optimizer states are finite."""
    sums = [value.detach().sum(dtype=torch.float64) for value in tensors.values() if value.is_floating_point()]
    if not sums or torch.stack([value.to(sums[0].device) for value in sums]).isfinite().all():
        return
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise NotFiniteError(f"{len(bad)} tensors hold NaN or infinity after step {step} (first: {bad[0]})")


def _where(step: int, named: Named) -> str:
    samples = [f"image {index} at timestep {time} ({_short(caption)})" for index, time, caption in named[:_SHOWN]]
    more = f"; and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return f"at step {step}, of {'; '.join(samples)}{more}"


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= _CAPTION else caption[:_CAPTION] + "...") if caption else "no caption"
