"""A scheduler of another class with the same noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkd.errors import ModelError

# What the model was trained with. The rest of a scheduler's settings says how images are drawn: each class its own way.
_TRAINED = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)


def check_schedule(scheduler: Any) -> None:
    """ModelError for a scheduler without a noise schedule by betas, as those of flow matching and EDM are."""
    config: Mapping[str, Any] = scheduler.config
    if config.get("trained_betas") is None and not all(key in config for key in _TRAINED[1:4]):
        raise ModelError(
            f"the scheduler {type(scheduler).__name__} has no noise schedule by beta_start, beta_end and "
            "beta_schedule, as Stable Diffusion 1.x and 2.x have: give the model with the scheduler that it was "
            "published with"
        )


def scheduler_like(scheduler: Any, kind: Any, **changes: Any) -> Any:
    """A scheduler of the class `kind` with the noise schedule of another; `changes` are of its own settings.

    `kind.from_config` alone forgets what a config left to its own class's defaults: LCM's and TCD's betas are not
    DDPM's. Raises ModelError when the other has no such schedule, as those of flow matching.
    """
    config: Mapping[str, Any] = scheduler.config
    check_schedule(scheduler)
    drawn = [key for key in config.get("_use_default_values", ()) if key not in _TRAINED]
    return kind.from_config(
        {"_class_name": type(scheduler).__name__, **config, "_use_default_values": drawn}, **changes
    )
