"""Options of a build, and a refusal that names one which target, library or machine does not have.

What each costs is in docs/build-engine.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from sdkd.bundle.manifest_checks import BUILD_OPTIONS
from sdkd.core.schema import problem
from sdkd.errors import InputError
from sdkd.targets.gpu_generations import generation, parse, targets_for
from sdkd.targets.gpu_trial import capabilities

REFIT = ("none", "lora", "all")
HARDWARE = {"none": "NONE", "ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
HIGHEST_LEVEL = 5
GIB = 1 << 30
TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
CURRENT = "current"  # in the place of compute capabilities: of the GPU that is here, named by the library or not


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built; the defaults are the fastest engine on the machine that builds it.

    Sizes in GiB. Raises InputError for a value that no target takes.
    """

    optimization_level: int | None = None  # 0 to 5; None: the library's own, 3
    workspace_gb: float | None = None  # of scratch memory that a layer may take at run time
    refit: str = "none"  # none, lora (the weights that a LoRA can touch) or all
    hardware_compatible: str = "none"  # ampere-plus or same-compute-capability: runs on other GPUs, too
    # GPU generations of an ahead-of-time plan, e.g. ("8.6", "8.9"); ("current",): of this machine's GPU alone
    compute_capabilities: tuple[str, ...] = ()
    memory_cap_gb: float | None = None  # that the build may take; it fails rather than take more

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= HIGHEST_LEVEL:
            raise InputError(f"--optimization-level {level} is not one of 0 to {HIGHEST_LEVEL}: 3 is the usual one")
        for option, choices in (("refit", REFIT), ("hardware_compatible", tuple(HARDWARE))):
            if getattr(self, option) not in choices:
                raise InputError(
                    f"{BUILD_OPTIONS[option]} {getattr(self, option)!r} is unknown: choose {', '.join(choices)}"
                )
        for option in ("workspace_gb", "memory_cap_gb"):
            size = getattr(self, option)
            if size is not None and not 0 < size < math.inf:
                raise InputError(f"{BUILD_OPTIONS[option]} {size:g} is no size: give GiB, more than 0")
        object.__setattr__(self, "compute_capabilities", _sorted_capabilities(self.compute_capabilities))

    def changed(self) -> dict[str, Any]:
        """JSON-ready: what is not as by default; part of what an engine is known by."""
        default = BuildOptions()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != getattr(default, name)
        }

    @staticmethod
    def of(changed: Mapping[str, Any]) -> BuildOptions:
        """The inverse of `changed`."""
        if wrong := problem(dict(changed), BuildOptions, "options"):
            raise InputError(f"an engine was built with {wrong}: build it again")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()}
        return BuildOptions(**values)


def _sorted_capabilities(names: tuple[str, ...]) -> tuple[str, ...]:
    if CURRENT in names:
        if others := [name for name in names if name != CURRENT]:
            raise InputError(
                f"--compute-capability {CURRENT!r} is this machine's GPU alone: leave out {', '.join(others)}, or name "
                "all by numbers"
            )
        return (CURRENT,)
    for name in names:
        if not re.fullmatch(r"\d+\.\d", name):
            raise InputError(
                f"--compute-capability {name!r} is not understood: give numbers such as 8.6,8.9,12.0, or {CURRENT}"
            )
    return tuple(sorted(set(names), key=parse))


TARGETS_OF: dict[str, tuple[str, ...]] = {
    "optimization_level": (TENSORRT, RTX, "inductor"),
    "workspace_gb": (TENSORRT, RTX),
    "refit": (TENSORRT, RTX),
    "hardware_compatible": (TENSORRT,),
    "compute_capabilities": (RTX,),
    "memory_cap_gb": ("onnxruntime", "openvino", TENSORRT, RTX, "inductor"),
}


def check_options(options: BuildOptions, target: str, library: ModuleType, has_gpu: bool) -> None:
    """InputError that names an option which this target, library or machine does not have, and says why."""
    for option in options.changed():
        if reason := _problem(option, options, target, library, has_gpu):
            raise InputError(
                f"{BUILD_OPTIONS[option]} cannot be had for {target}: {reason}. Leave it out, or choose another"
            )


def _problem(option: str, options: BuildOptions, target: str, library: ModuleType, has_gpu: bool) -> str | None:
    if target not in TARGETS_OF[option]:
        return f"it is an option of {' and '.join(TARGETS_OF[option])}"
    asked, name = options.compute_capabilities, f"{library.__name__} {library.__version__}"
    if option == "hardware_compatible":
        level = HARDWARE[options.hardware_compatible]
        known = hasattr(library.HardwareCompatibilityLevel, level)
        return None if known else f"{name} has no HardwareCompatibilityLevel.{level}"
    if option == "compute_capabilities":
        if asked == (CURRENT,):
            here = (
                f"{CURRENT!r} is the NVIDIA GPU of this machine, and torch sees none: name generations such as 8.6,8.9"
            )
            return None if has_gpu else here
        unknown = [one for one in asked if one not in capabilities(library)]
        return _unknown_capability(name, unknown, capabilities(library)) if unknown else None
    # Measured with tensorrt_rtx 1.7.1: without a GPU, "MyelinCheckException: graph_jit.cpp: CHECK(status ==
    # CUDA_SUCCESS) failed"; for several GPU generations, "kernel_gen.cpp: CHECK(sm_vers_.size() == 1) failed".
    if option == "refit" and target == RTX and not has_gpu:
        return f"{name} builds such a plan only where there is an NVIDIA GPU"
    if option == "refit" and target == RTX and len(asked) != 1:
        return f"such a plan is for one GPU generation: name it with --compute-capability, or give {CURRENT} there"
    return None


def _unknown_capability(library: str, unknown: Sequence[str], known: Sequence[str]) -> str:
    others = ", ".join(one for one in targets_for(unknown[0]) if one != RTX)
    return (
        f"{library} does not know {', '.join(unknown)} (it knows {', '.join(known)}). "
        f"For {generation(unknown[0])} there is {others or 'no other target'}"
    )


def difference(built: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """How recorded options differ from those asked for, in words; of those that this version has."""
    return [
        f"built with {BUILD_OPTIONS[name]} {_word(built.get(name, usual))}, asked for {_word(asked.get(name, usual))}"
        for name, usual in asdict(BuildOptions()).items()
        if built.get(name, usual) != asked.get(name, usual)
    ]


def _word(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str("" if value is None else value)
    return text or "default"
