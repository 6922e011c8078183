"""Options of a build: one frozen dataclass, what each needs of target and library, and a refusal that names the option.

What an option costs is in docs/build-engine.md. What a library has is found by looking for the attribute.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from sdkd.core.schema import problem
from sdkd.errors import InputError
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
    strip_weights: bool = False  # the plan holds no weights: they are read from the ONNX when it is opened
    weight_streaming: bool = False  # weights may stay in host memory and be copied when needed
    version_compatible: bool = False  # runs with later versions of the library, too
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
                raise InputError(f"{typed(option)} {getattr(self, option)!r} is unknown: choose {', '.join(choices)}")
        for option in ("workspace_gb", "memory_cap_gb"):
            size = getattr(self, option)
            if size is not None and not 0 < size < math.inf:
                raise InputError(f"{typed(option)} {size:g} is no size: give GiB, more than 0")
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
    return tuple(sorted(set(names), key=lambda name: tuple(map(int, name.split(".")))))


def typed(option: str) -> str:
    """An option's name on the command line."""
    return "--compute-capability" if option == "compute_capabilities" else "--" + option.replace("_", "-")


@dataclass(frozen=True)
class Need:
    """What an option needs: targets (why not, for each other), attributes of the library, a GPU where it builds."""

    attributes: tuple[str, ...] = ()
    targets: tuple[str, ...] = (TENSORRT, RTX)
    reasons: Mapping[str, str] = field(default_factory=dict)
    gpu: tuple[str, ...] = ()  # targets that build this only where there is one


NEEDS: dict[str, Need] = {
    "optimization_level": Need(("IBuilderConfig.builder_optimization_level",)),
    "workspace_gb": Need(("IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE")),
    # Measured with tensorrt_rtx 1.7.1: without a GPU, "MyelinCheckException: graph_jit.cpp: CHECK(status ==
    # CUDA_SUCCESS) failed"; for several GPU generations, "kernel_gen.cpp: CHECK(sm_vers_.size() == 1) failed".
    "refit": Need(("BuilderFlag.REFIT",), gpu=(RTX,)),
    "strip_weights": Need(("BuilderFlag.STRIP_PLAN",), gpu=(RTX,)),
    "weight_streaming": Need(("BuilderFlag.WEIGHT_STREAMING", "ICudaEngine.weight_streaming_budget_v2")),
    "version_compatible": Need(("BuilderFlag.VERSION_COMPATIBLE", "Runtime.engine_host_code_allowed")),
    "hardware_compatible": Need(
        ("IBuilderConfig.hardware_compatibility_level",),
        (TENSORRT,),
        {RTX: "its plans are for several GPU generations anyway: name them with --compute-capability"},
    ),
    "compute_capabilities": Need(
        ("IBuilderConfig.set_compute_capability", "ComputeCapability", "ComputeCapability.CURRENT"),
        (RTX,),
        {TENSORRT: "its engines are timed on the GPU of this machine: see --hardware-compatible"},
    ),
    "memory_cap_gb": Need((), ("onnxruntime", "openvino", TENSORRT, RTX)),
}


def check_options(options: BuildOptions, target: str, library: ModuleType, has_gpu: bool) -> None:
    """InputError that names an option which this target, library or machine does not have, and says why."""
    for option in options.changed():
        reason = (
            _not_for_target(option, target)
            or _not_in_library(option, options, library)
            or _not_on_this_machine(option, options, target, library, has_gpu)
        )
        if reason:
            raise InputError(f"{typed(option)} cannot be had for {target}: {reason}. Leave it out, or choose another")


def _not_for_target(option: str, target: str) -> str | None:
    need = NEEDS[option]
    if target in need.targets:
        return None
    return need.reasons.get(target, f"it is an option of {' and '.join(need.targets)}")


def _not_in_library(option: str, options: BuildOptions, library: ModuleType) -> str | None:
    wanted = list(NEEDS[option].attributes)
    if option == "hardware_compatible":
        wanted.append(f"HardwareCompatibilityLevel.{HARDWARE[options.hardware_compatible]}")
    name = f"{library.__name__} {library.__version__}"
    if missing := [path for path in wanted if not has(library, path)]:
        return f"{name} has no {missing[0]}"
    if option == "compute_capabilities":
        known = capabilities(library)
        if unknown := [one for one in options.compute_capabilities if one not in (*known, CURRENT)]:
            return f"{name} does not know {', '.join(unknown)} (it knows {', '.join(known)})"
    return None


def _not_on_this_machine(
    option: str, options: BuildOptions, target: str, library: ModuleType, has_gpu: bool
) -> str | None:
    if option == "version_compatible" and lean_runtime(library.__name__) is None:
        return f"{library.__name__} {library.__version__} needs the lean runtime for it, and libnvinfer_lean is missing"
    if option == "compute_capabilities" and CURRENT in options.compute_capabilities and not has_gpu:
        return f"{CURRENT!r} is the NVIDIA GPU of this machine, and torch sees none: name generations such as 8.6,8.9"
    if target not in NEEDS[option].gpu:
        return None
    if not has_gpu:
        return f"{library.__name__} {library.__version__} builds such a plan only where there is an NVIDIA GPU"
    if len(options.compute_capabilities) != 1:
        return f"such a plan is for one GPU generation: name it with --compute-capability, or give {CURRENT} there"
    return None


def has(library: ModuleType, path: str) -> bool:
    """Whether a library has a dotted attribute such as `BuilderFlag.REFIT`."""
    try:
        functools.reduce(getattr, path.split("."), library)
    except AttributeError:
        return False
    return True


def lean_runtime(module: str) -> Path | None:
    """The lean runtime's library of `tensorrt` or `tensorrt_rtx` among the installed packages, None without one."""
    prefix = module.replace("_", "-")
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(prefix) and ("rtx" in name) == ("rtx" in prefix):
            for file in distribution.files or ():
                if "nvinfer_lean" in file.name and ".so" in file.name:
                    return Path(str(distribution.locate_file(file)))
    return None


def difference(built: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """How recorded options differ from those asked for, in words; unknown ones of a later version, too."""
    default: Callable[[str], Any] = {one.name: one.default for one in fields(BuildOptions)}.get
    names = [name for name in dict.fromkeys((*built, *asked)) if built.get(name) != asked.get(name)]
    return [
        f"built with {typed(name)} {_word(built.get(name, default(name)))}, "
        f"asked for {_word(asked.get(name, default(name)))}"
        for name in names
    ]


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "default"
    return {None: "default", True: "on", False: "off"}.get(value, str(value)) if _plain(value) else str(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
