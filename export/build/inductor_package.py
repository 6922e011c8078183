"""Target inductor: the component's traced program compiled ahead of time by PyTorch (AOTInductor), without weights.

One package (.pt2) holds the code of every profile. Its weights stay in the exported graph, from which a session takes
them: a few megabytes of code for a model of any size, and other weights are other tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from export.build.job import Built, Job, Run
from export.build.options import BuildOptions
from export.build.parity import seeded_tensors
from sdkd.bundle.manifest import Bundle, ComponentRecord
from sdkd.bundle.onnx_weights import as_tensor, torch_weights, weight_names
from sdkd.bundle.program import PROGRAM_FILE, read_program
from sdkd.core.console import Progress, within
from sdkd.core.files import sha256
from sdkd.errors import BuildError, BundleError
from sdkd.targets import native_code
from sdkd.targets.inductor import CONSTANTS, Package, compiler, compiler_version, laid_out, own_name, profile_name
from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import cache_folder

if TYPE_CHECKING:
    import numpy as np

REMAKE = "export the model again"
WORK_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
AUTOTUNE_FROM, SEARCH_FROM, USUAL_LEVEL = 3, 5, 3  # optimization levels: kernels are timed on the GPU; more of them
# The weights are given at run time. In the package they would be twice on disk, and compiled into the library.
PACKAGE = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}
SEARCH = {"max_autotune_gemm_search_space": "EXHAUSTIVE"}


def half_precision() -> str:
    """The fastest float precision of its engines."""
    return "fp16" if gpu() else "fp32"


def flags(engine_precision: str, onnx_precision: str) -> dict[str, Any]:
    """Options of the build: the kind of device, and of a CPU the compiler that all of its code is made by."""
    return {"device": "cuda"} if gpu() else {"device": "cpu", "compiler": compiler_version(compiler())}


def check(bundle: Bundle, component: ComponentRecord) -> None:
    """Before anything is compiled: BuildError for a component that was exported without its traced program, BundleError
    for a damaged one, EngineError for one that is not this user's own.
    """
    if component.program is None:
        raise BuildError(
            f"{component.name} was exported without its traced program ({PROGRAM_FILE}), which inductor compiles: "
            f"{REMAKE}"
        )
    if wrong := component.program.problem(bundle.path):
        raise BundleError(f"bundle {str(bundle.path)!r}: {wrong}: {REMAKE}")
    _check_own(bundle.path / component.program.path, component.program.sha256)


def _check_own(file: Path, digest: str) -> None:
    native_code.check(f"the traced program {str(file)!r}", digest, REMAKE)


def build(job: Job, progress: Progress) -> Built:
    """Compile every profile and save <component>.pt2, which is noted as this user's own.

    Constants that the graph does not keep by name lie beside it. Raises what `read_program` and the compiler raise.
    """
    from safetensors.torch import save
    from torch._inductor.package.package import package_aoti

    _keep_work_private()
    progress("reading the traced program", 0.0)
    module, device = _traced(job), torch.device(job.flags["device"])
    compiled: dict[str, Any] = {}
    for index, profile in enumerate(job.profiles):
        start, end = (0.05 + 0.9 * each / len(job.profiles) for each in (index, index + 1))
        compiled[profile_name(index)] = _compiled(module, job, profile, within(progress, start, end))
    file = job.file(".pt2")
    package_aoti(str(file), compiled)
    native_code.note([sha256(file)])
    progress("opening the package", 0.95)
    package = Package(file, len(job.profiles), device)
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    every = {own_name(name): tensor.detach() for name, tensor in tensors}
    package.give(every)
    others = {name: every[name].cpu().contiguous() for name in set(package.constants) - weight_names(Path(job.onnx))}
    if others:
        job.file(CONSTANTS).write_bytes(save(others))
    files = (file.name, *([job.file(CONSTANTS).name] if others else []))
    reference = _eager(module, job, device) if job.precision == "bf16" else None
    return Built(files, {"weights": "graph"}, run=_runner(package, job, device), reference=reference)


class _Positional(nn.Module):
    """A traced program behind positional inputs, whatever it packs them into; its outputs are contiguous."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output.contiguous() for output in self.program(*inputs))


def _keep_work_private() -> None:
    """Have the compiler work among the user's caches, unless the user named a folder: torch's own is in /tmp."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(WORK_FOLDER, default_cache_dir()) == default_cache_dir():
        os.environ[WORK_FOLDER] = str(cache_folder() / "inductor")


def _traced(job: Job) -> nn.Module:
    """The program that the graph was made of, with the graph's weights, on the job's device."""
    from torch.export.passes import move_to_device_pass

    file = Path(job.onnx).with_name(PROGRAM_FILE)
    _check_own(file, sha256(file))  # as it is now: a build may wait for others for long
    weights = {name: laid_out(weight) for name, weight in torch_weights(Path(job.onnx)).items()}
    return _Positional(move_to_device_pass(read_program(file, weights), job.flags["device"]).module())


def _compiled(module: nn.Module, job: Job, profile: Mapping[str, Any], progress: Progress) -> Any:
    """What the compiler writes for one profile: axes of one size are fixed, kernels are chosen at the best sizes."""
    progress("tracing it at the profile's sizes", 0.0)
    best = seeded_tensors(job.contract, {name: _traced_at(*shapes) for name, shapes in profile.items()})
    inputs = tuple(as_tensor(best[spec.name]).to(job.flags["device"]) for spec in job.contract.inputs)
    shapes = tuple(_dynamic(*profile[spec.name]) for spec in job.contract.inputs)
    with torch.no_grad():
        program = torch.export.export(
            module, inputs, dynamic_shapes=(shapes,), strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        progress("compiling", 0.2)
        return torch._inductor.aot_compile(program.module(), inputs, options=_options(job))


def _options(job: Job) -> dict[str, Any]:
    """Inductor's options: on a GPU kernels are timed against one another, from level 3 on, which is the usual one."""
    asked = BuildOptions.of(job.flags.get("options", {})).optimization_level
    level = USUAL_LEVEL if asked is None else asked
    if job.flags["device"] == "cpu" or level < AUTOTUNE_FROM:
        return dict(PACKAGE)
    return PACKAGE | AUTOTUNE | (SEARCH if level >= SEARCH_FROM else {})


def _traced_at(low: Sequence[int], best: Sequence[int], high: Sequence[int]) -> tuple[int, ...]:
    """The best shape; where an axis may be longer than 1, at least 2: torch.export takes a 1 for a constant."""
    return tuple(
        max(size, min(2, most)) if least != most else size for least, size, most in zip(low, best, high, strict=True)
    )


def _dynamic(low: Sequence[int], _: Sequence[int], high: Sequence[int]) -> dict[int, Any]:
    """For torch.export: the axes that may differ, and from where to where."""
    sides = enumerate(zip(low, high, strict=True))
    return {axis: torch.export.Dim.AUTO(min=least, max=most) for axis, (least, most) in sides if least != most}


def _runner(package: Package, job: Job, device: torch.device) -> Run:
    """Runs a package on numpy's arrays; bfloat16, which numpy lacks, comes back as float32."""

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        inputs = [as_tensor(feeds[spec.name]).to(device) for spec in job.contract.inputs]
        return [_array(found) for found in package.run(job.profile_for(feeds), inputs)]

    return run


def _eager(module: nn.Module, job: Job, device: torch.device) -> Run:
    """Runs the traced program itself: what bf16 is compared with, since ONNX Runtime has no bf16 on a CPU."""

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            found = module(*(as_tensor(feeds[spec.name]).to(device) for spec in job.contract.inputs))
        return [_array(tensor) for tensor in found]

    return run


def _array(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    found: np.ndarray = whole.detach().cpu().numpy()
    return found
