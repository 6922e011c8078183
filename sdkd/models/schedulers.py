"""Schedulers by name: which of diffusers' draw with Stable Diffusion, and whether one can do so many steps."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import Any

from sdkd.core.numbers import check_number
from sdkd.errors import InputError, MissingExtraError
from sdkd.models.noise_schedule import check_schedule, scheduler_like

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
