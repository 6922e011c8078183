"""The conditions of a UNet's or ControlNet's call as its engine takes them: by input name, checked, zeros for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engines.modules.base import FIXED, EngineModule, refuse
from sdkd.core.conditions import ADDED, CONDITIONS, TIMESTEP, Condition
from sdkd.core.contract import TensorSpec, split_axis
from sdkd.errors import EngineError

MASKS = f"{FIXED}: Stable Diffusion attends to all tokens, so only a mask of ones can be given"
# Why an argument of the eager module has no counterpart in an engine, where it is not simply FIXED.
REFUSALS = {
    "attention_mask": MASKS,
    "encoder_attention_mask": MASKS,
    **{
        name: f"{FIXED}: {row.absent}"
        for row in CONDITIONS
        for prefix in row.prefixes
        for name in (prefix, f"{ADDED}[{prefix!r}]")
    },
}


def condition_tensors(
    module: EngineModule, sample: torch.Tensor, arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """A call's conditions by input name; zeros where one is not given and need not be.

    EngineError for a condition that the engine has no input for, one that it needs, and tensors that do not fit it.
    """
    rest = dict(arguments)
    found: dict[str, torch.Tensor] = {}
    for row in CONDITIONS:
        if specs := row.of(module.session.contract):
            tensors = row.unpack(rest)
            _check_fit(module, row, specs, tensors, sample)
            found |= dict(zip((spec.name for spec in specs), tensors, strict=False))
            found |= {spec.name: _zeros(spec, sample) for spec in specs[len(tensors) :]}
    added = rest.pop(ADDED, None)
    refuse(module, rest | {f"{ADDED}[{name!r}]": value for name, value in (added or {}).items()}, REFUSALS)
    batch = sample.shape[0]
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in found.items()}


def _check_fit(
    module: EngineModule, row: Condition, specs: Sequence[TensorSpec], tensors: Sequence[Any], sample: torch.Tensor
) -> None:
    """EngineError unless tensors are as many, and as wide, as a condition has inputs."""
    name = type(module).__name__
    if row.needed and len(tensors) < len(specs):
        raise EngineError(f"{name} needs {', '.join(spec.name for spec in specs)}: {row.misfit}")
    if tensors and not 0 <= len(specs) - len(tensors) <= row.spare:
        raise EngineError(f"{name} takes {len(specs)} {row.name}, not {len(tensors)}: {row.misfit}")
    for spec, tensor in zip(specs, tensors, strict=False):
        width, batch = spec.axes[1], sample.shape[0]
        wide = isinstance(width, str) or tensor.shape[1:2] == (width,)
        if tensor.dim() != len(spec.axes) or not wide or tensor.shape[0] not in (1, batch):
            wanted = ", ".join(map(str, (batch, width, *spec.axes[2:])))
            raise EngineError(
                f"{name} takes a {spec.name} of shape ({wanted}), a row per latent, not {tuple(tensor.shape)}: "
                f"{row.misfit}"
            )


def _zeros(spec: TensorSpec, sample: torch.Tensor) -> torch.Tensor:
    """A condition that is not there: zeros that take no memory of their own until a session makes them contiguous."""
    sides = dict(zip(("height", "width"), sample.shape[2:], strict=True)) | {"images": 1}
    axes = [split_axis(axis) if isinstance(axis, str) else (None, axis) for axis in spec.axes[1:]]
    shape = [sides[root] // number if root else number for root, number in axes]
    return torch.zeros((), dtype=spec.torch_dtype, device=sample.device).expand(sample.shape[0], *shape)


def timesteps(module: EngineModule, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """The timestep beside the latents as the engine takes it: a scalar, or one for each sample.

    EngineError when samples have different ones, and the engine takes one.
    """
    spec = next(spec for spec in module.session.contract.inputs if spec.name == TIMESTEP)
    if not isinstance(timestep, torch.Tensor):
        timestep = scalar(timestep, sample)
    if spec.axes:
        return timestep.flatten().to(sample.device).expand(sample.shape[0])
    if not timestep.dim() and timestep.device == sample.device:
        return timestep  # as pipelines give it
    if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
        raise EngineError(
            f"{type(module).__name__} takes one timestep for the whole batch, not {timestep.tolist()}: call it once "
            "per timestep, or export the model with --timesteps"
        )
    return timestep.flatten()[0].to(sample.device)


def scalar(value: float, beside: torch.Tensor) -> torch.Tensor:
    """A number beside a tensor: written by a kernel, where a copy from the host would wait for the GPU in each step."""
    return torch.full((), float(value), dtype=torch.float32, device=beside.device)
