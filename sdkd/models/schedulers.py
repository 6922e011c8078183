"""Schedulers: by name, those that draw with Stable Diffusion; of another class with the same noise schedule."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

from sdkd.core.numbers import check_number
from sdkd.errors import InputError, MissingExtraError, ModelError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "dpm-sde": "DPMSolverSDEScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# What a class must take to know this noise schedule, and marks of those that take it and draw nothing from a prompt.
_NEEDED = {"beta_start", "beta_end", "beta_schedule", "prediction_type"}
_OTHERS = ("Inverse", "CogVideoX", "RePaint", "UnCLIP", "Cosine")


def scheduler_class(name: str) -> Any:
    """The class of one of SCHEDULERS, or of diffusers'.

    InputError when it is unknown or of another family, MissingExtraError without a package that it needs.
    """
    import diffusers

    kind = SCHEDULERS.get(name.lower(), name)
    found = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    names = f"choose one of {', '.join(SCHEDULERS)}, or a diffusers class"
    if found is None or not hasattr(found, "from_config"):
        raise InputError(f"scheduler {name!r} is unknown: {names}")
    for package in getattr(found, "_backends", ()):  # of diffusers' stand-in for a class that cannot be imported
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "sde", f"scheduler {name!r}")
    taken = set(inspect.signature(found.__init__).parameters)
    if not taken >= _NEEDED or any(mark in kind for mark in _OTHERS):
        raise InputError(
            f"scheduler {name!r} is of another family ({kind}: flow matching, EDM, inversion or another model's), and "
            f"Stable Diffusion's noise schedule has no place in it: {names}"
        )
    return found


def set_scheduler(pipe: Any, name: str) -> None:
    """Swap the scheduler for another, same noise schedule; raises what `scheduler_class` raises."""
    pipe.scheduler = scheduler_like(pipe.scheduler, scheduler_class(name))


def use_scheduler(pipe: Any, name: str | None) -> None:
    """As `set_scheduler`, where the pipeline does not have a scheduler of that class yet; None changes nothing."""
    if name is not None and type(pipe.scheduler) is not scheduler_class(name):
        set_scheduler(pipe, name)


def check_steps(scheduler: Any, steps: int) -> None:
    """InputError unless the scheduler can do so many steps, ModelError for one of another family; it stays as it is."""
    check_schedule(scheduler)
    name, trained = type(scheduler).__name__, int(scheduler.config.get("num_train_timesteps", 1000))
    check_number("steps", steps, 1, trained, whole=True)
    try:
        copy.deepcopy(scheduler).set_timesteps(steps)
    except (ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"{name} cannot do {steps} steps ({error}): give another number or --scheduler") from error


def seed_scheduler(scheduler: Any, seeds: list[int]) -> None:
    """Have a scheduler that draws its own noise (DPMSolverSDE) draw by the images' seeds, not by chance."""
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = seeds


# What the model was trained with. The rest of a scheduler's settings says how images are drawn: each class its own way.
_TRAINED = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)


def noise_schedule(scheduler: Any) -> dict[str, Any]:
    """What a scheduler's model was trained with, every setting filled in; ModelError as `check_schedule`."""
    from diffusers import DDPMScheduler

    config = scheduler_like(scheduler, DDPMScheduler).config
    return {key: config[key] for key in _TRAINED}


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
    DDPM's. And it clips x0 to [-1, 1] as DDIM and DDPM do by default, which is for pixels and spoils latents: only
    where the other says so itself. Raises ModelError when the other has no such schedule, as those of flow matching.
    """
    config: Mapping[str, Any] = scheduler.config
    check_schedule(scheduler)
    default = config.get("_use_default_values", ())
    clipped = "clip_sample" in config and "clip_sample" not in default
    if not clipped and "clip_sample" in inspect.signature(kind.__init__).parameters:
        changes = {"clip_sample": False, **changes}
    drawn = [key for key in default if key not in _TRAINED]
    return kind.from_config(
        {"_class_name": type(scheduler).__name__, **config, "_use_default_values": drawn}, **changes
    )
