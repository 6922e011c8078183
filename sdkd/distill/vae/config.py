"""Settings of a run that trains a small VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdkd.core.numbers import Bounds
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.vae.losses import DEFAULT, parse_losses
from sdkd.errors import InputError

# Those settings of every training that mean something here.
SHARED = (
    *("steps", "batch_size", "learning_rate", "optimizer", "schedule", "warmup", "weight_decay", "betas"),
    *("max_grad_norm", "max_images", "resolution", "crop", "flip", "latents", "workers", "precision", "device"),
    *("seed", "log_every", "save_every", "keep"),
)
# TAESD's, by its author (https://github.com/madebyollin/taesd/issues/11): Adam, 3e-4, betas 0.9 0.9, batch 16.
TAESD: dict[str, Any] = {
    "batch_size": 16, "learning_rate": 3e-4, "betas": (0.9, 0.9), "weight_decay": 0.0, "precision": "fp32",
    "log_every": 50,
}  # fmt: skip
_WIDTH, _BLOCKS = Bounds(1, 1024, whole=True), Bounds(1, 64, whole=True)


@dataclass(frozen=True)
class VaeConfig:
    """Shape of the small VAE, weights of its losses, and the settings of the run; InputError for what cannot be.

    `width`: channels of every layer; `blocks`: residual blocks at each size of the image but the largest, which has
    one, the smallest first, or one number for all. 64 and 3 are TAESD's. `run`: a finetune config, of which the names
    in SHARED count.
    """

    run: TrainConfig
    width: int = 64
    blocks: tuple[int, ...] = (3,)
    losses: Mapping[str, float] = field(default_factory=lambda: parse_losses(DEFAULT))

    objective: ClassVar[str] = "vae-distill"

    def __post_init__(self) -> None:
        problems = [_WIDTH.problem("width", self.width), *(_BLOCKS.problem("blocks", count) for count in self.blocks)]
        if problem := next(filter(None, problems), ""):
            raise InputError(problem)
        if self.run.precision == "fp16":
            raise InputError("precision 'fp16' overflows in Stable Diffusion's VAE: give bf16 or fp32")
        if self.run.buckets:
            raise InputError("buckets are for UNets: leave them off")

    def to_json(self) -> dict[str, Any]:
        """All settings that count, ready for JSON."""
        own = {name: getattr(self.run, name) for name in SHARED}
        return own | {"width": self.width, "blocks": list(self.blocks), "losses": dict(self.losses)}


def vae_config(**settings: Any) -> VaeConfig:
    """A config from settings by name, TAESD's where one is not given; `blocks` and `losses` as texts, None for the
    default.

    InputError for what cannot be.
    """
    own = {name: settings.pop(name) for name in ("width",) if name in settings}
    own["blocks"] = _parse_blocks(str(settings.pop("blocks", 3)))
    losses = parse_losses(settings.pop("losses", None) or DEFAULT)
    return VaeConfig(TrainConfig(objective="finetune", **(TAESD | settings)), losses=losses, **own)


def _parse_blocks(text: str) -> tuple[int, ...]:
    """`3` or `6,6,3`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"blocks {text!r} are no whole numbers: give one, such as 3, or one a size: 6,6,3") from None
