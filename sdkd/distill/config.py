"""What a distillation run does, as one frozen dataclass: its fields are the command's options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sdkd.distill.pairs import PAIRS
from sdkd.errors import InputError
from sdkd.students import LossWeights, StudentSpec, student_spec

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a run; InputError lists everything that is wrong with them at once.

    Steps are optimizer steps everywhere. None means: what the student's spec (or the teacher) says.
    """

    student: str = "tiny"
    steps: int = 1000
    batch_size: int = 32  # images per forward pass
    accumulation: int = 1  # forward passes per optimizer step
    # losses
    task_weight: float | None = None
    output_weight: float | None = None
    feature_weight: float | None = None
    pairs: str | None = None  # preset of feature pairs
    # optimizer: AdamW
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0  # steps
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0  # global norm; 0 turns clipping off
    ema: float = 0.0  # decay of the averaged weights that are returned; 0 turns averaging off
    # data
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    max_images: int | None = None
    resolution: int | None = None  # pixels
    # run
    precision: str = "fp32"  # of the forward passes; weights, optimizer and losses are float32
    device: str = "auto"
    seed: int = 0
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise InputError("; ".join(problems))

    @property
    def spec(self) -> StudentSpec:
        """The student's spec."""
        return student_spec(self.student)

    @property
    def pair_preset(self) -> str:
        """Name of the feature pairs: the one asked for, else the student's usual one."""
        return self.pairs or self.spec.pairs

    @property
    def weights(self) -> LossWeights:
        """Loss weights: those asked for, else the student's usual ones."""
        asked = (self.task_weight, self.output_weight, self.feature_weight)
        return LossWeights(
            *(usual if own is None else own for own, usual in zip(asked, self.spec.weights, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        """All settings, with the student's defaults filled in."""
        filled = {f"{name}_weight": value for name, value in self.weights._asdict().items()}
        return asdict(self) | filled | {"student": self.spec.name, "pairs": self.pair_preset}

    def _problems(self) -> Iterator[str]:
        student_spec(self.student)
        choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "pairs": (None, *PAIRS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(choice) for choice in allowed if choice)
                yield f"{name} {getattr(self, name)!r} is unknown: choose one of {names}"
        for name in ("steps", "batch_size", "accumulation", "log_every", "max_images", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} {value} is not positive: give 1 or more"
        for name in ("warmup", "weight_decay", "max_grad_norm", "task_weight", "output_weight", "feature_weight"):
            if (getattr(self, name) or 0) < 0:
                yield f"{name} {getattr(self, name)} is negative: give 0 or more"
        if not self.learning_rate > 0:
            yield f"learning_rate {self.learning_rate} is not positive: give e.g. 1e-4"
        if not 0 <= self.ema < 1:
            yield f"ema {self.ema} is not a decay: give 0 (off) or e.g. 0.999"
        if not 0 <= self.caption_dropout <= 1:
            yield f"caption_dropout {self.caption_dropout} is not a share: give 0 to 1"
        if not any(self.weights):
            yield "all three loss weights are 0, so there is nothing to learn: give at least one above 0"
