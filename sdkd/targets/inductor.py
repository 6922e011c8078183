"""Target inductor: what PyTorch's ahead-of-time compiler needs here, and how it wants weights laid out."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.targets.nvidia import gpu

if TYPE_CHECKING:
    import torch

CONSTANTS = ".constants.safetensors"  # beside a package, after its component: what the exported graph does not name
USUAL = "clang++" if sys.platform == "darwin" else "g++"  # what Inductor takes where CXX does not say


def compiler() -> str:
    """Path of the C++ compiler that Inductor takes, from CXX or the system's usual one; empty where there is none."""
    return shutil.which(os.environ.get("CXX") or USUAL) or ""


@functools.cache
def compiler_version(path: str) -> str:
    """The first line of what a compiler says of itself, without its path: `g++ (Debian 12.2.0-14) 12.2.0`."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return re.sub(r"\s+", " ", said.splitlines()[0]).strip() if said.strip() else "unknown"


def missing() -> tuple[str, str] | None:
    """What a build lacks here and what to do; None where nothing is missing. Engines that were built run without."""
    if not compiler():
        named = os.environ.get("CXX")
        return (
            f"no C++ compiler ({f'CXX is {named!r}, which is not there' if named else f'{USUAL} is not there'})",
            "install one (apt install g++), or name it in CXX",
        )
    if gpu() and importlib.util.find_spec("triton") is None:
        return "triton is not installed, which writes the kernels for a GPU", "pip install triton"
    return None


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """A weight as engines read it: a convolution's with its channels last, every other contiguous.

    Builder and session both ask here: compiled code knows the strides of its weights and checks none.
    """
    import torch

    return weight.contiguous(memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format)


def profile_name(index: int) -> str:
    """What a package calls the code of an optimization profile."""
    return f"profile_{index}"


def own_name(constant: str) -> str:
    """A package's constant by the component's state-dict name."""
    return constant.removeprefix("program.").removeprefix("module.")


class Package:
    """A compiled package, opened: the code of every profile, and the tensors that are its weights.

    It checks no file: see `sdkd.targets.native_code`. RuntimeError where torch cannot open it.
    """

    def __init__(self, file: Path, profiles: int, device: torch.device) -> None:
        from torch.export.pt2_archive._package import load_pt2

        # Of one thread: calls are made in turn, and the code's own events would be part of a CUDA graph.
        opened = load_pt2(file, run_single_threaded=True, device_index=-1 if device.index is None else device.index)
        self._models = [opened.aoti_runners[profile_name(index)] for index in range(profiles)]
        self._given: Mapping[str, torch.Tensor] = {}
        self.constants = {own_name(name): name for model in self._models for name in model.get_constant_fqns()}

    def give(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read weights and constants, by state-dict name, from these tensors' own memory from now on.

        On the package's device, as `laid_out` has them. Writing into them changes what the next run reads.
        """
        given = {name: tensors[name] for name in self.constants}
        for model in self._models:
            own = {constant: given[own_name(constant)] for constant in model.get_constant_fqns()}
            model.load_constants(own, check_full_update=True, user_managed=True)
        self._given = given  # the code holds addresses alone

    def run(self, profile: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of one profile's code, on the current stream: fresh tensors, of any strides."""
        return list(self._models[profile].loader.run(list(inputs)))
