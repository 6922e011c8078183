"""Whether a TensorRT kind runs on this GPU, found out by building, opening and running a very small engine.

An ahead-of-time library names the GPU generations that it builds for; what it does on one that it does not name cannot
be read anywhere. So it is tried, in a child process, and the answer is kept among the user's caches, for this GPU,
driver and version of the library alone.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, TypeVar

from sdkd.core.console import Progress, quiet
from sdkd.core.files import read_json, write_json
from sdkd.errors import EngineError, InputError
from sdkd.targets.nvidia import driver_version, gpu
from sdkd.targets.registry import cache_folder, check_target, installed_version, require
from sdkd.targets.tensorrt_api import ICudaEngine, ILogger, TensorRT, recorder

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

PORTABLE, CURRENT = "portable", "current"
PLANS = {PORTABLE: "as sdkd builds it", CURRENT: "built for this GPU alone"}
RAN = "ran"
CHANNELS, SIDE, WEIGHT = 16, 8, 1 / 64
EXPECTED = 9 * CHANNELS * WEIGHT  # of every output: a 3x3 convolution of ones, exact in half precision


@dataclass(frozen=True)
class Trial:
    """How far one small engine came: `step` is `ran`, or what failed, with the library's own words."""

    target: str
    plan: str  # portable or current
    step: str  # import, build, open, run, crash; or ran
    message: str
    version: str
    gpu: str
    compute_capability: str
    driver: str
    seconds: float = 0.0

    @property
    def ran(self) -> bool:
        """Whether the engine ran and its values were right."""
        return self.step == RAN

    def words(self) -> str:
        """The answer in one sentence."""
        place = f"{self.gpu or 'no GPU'} (driver {self.driver or 'unknown'})"
        said = "ran, values right" if self.ran else f"failed at {self.step!r}: {self.message}"
        return f"{PLANS[self.plan]}, {said}; {place}"


@dataclass(frozen=True)
class Support:
    """What is known of a target on a GPU of some compute capability, and what was measured on this one."""

    target: str
    compute_capability: str
    named: bool | None  # None: the library names no generations
    known: str
    measured: str


def capabilities(library: TensorRT) -> tuple[str, ...]:
    """Compute capabilities that an ahead-of-time library names, in order; () for a library without them."""
    members = getattr(getattr(library, "ComputeCapability", None), "__members__", {})
    found = [re.fullmatch(r"SM(\d+)(\d)", name) for name in members]
    pairs = sorted({(int(name[1]), int(name[2])) for name in found if name})
    return tuple(f"{major}.{minor}" for major, minor in pairs)


def reasons(trt: TensorRT, diagnostics: SupportsInt) -> list[str]:
    """Names of the bits that TensorRT-RTX sets when it finds an engine invalid."""
    members = trt.EngineInvalidityDiagnostics.__members__
    bits = int(getattr(diagnostics, "value", diagnostics))
    found = [name.lower().replace("_", " ") for name, member in members.items() if bits & int(member.value)]
    return found or ["invalid"]


def support(target: str, capability: str, trials: Sequence[Trial] = ()) -> Support:
    """What a target's library says of GPUs of this compute capability, and what trials said of this one.

    MissingExtraError without the library.
    """
    library = require(check_target(target).name)
    name, named = f"{library.__name__} {library.__version__}", capabilities(library)
    if not named:
        answer, known = None, f"{name} builds for the GPU that it finds and names no generations"
    elif capability in named:
        answer, known = True, f"compute capability {capability} is one that {name} names"
    else:
        answer, known = False, f"{name} names {', '.join(named)}, and not {capability}"
    measured = "; ".join(trial.words() for trial in trials) or "not measured: sdkd doctor --try finds out on such a GPU"
    return Support(check_target(target).name, capability, answer, known, measured)


def attempt(target: str, plan: str = PORTABLE, progress: Progress = quiet) -> dict[str, Any]:
    """Try one plan here, in this process, which a library may crash: a Trial as JSON. Never raises for a known one."""
    name, start = check_target(target).name, time.perf_counter()
    step, said = "import", ""
    messages: deque[str] = deque()
    try:
        trt, logger = require(name), recorder(name)
        messages = logger.messages
        messages.clear()  # what was logged before says nothing of this plan
        step = "build"
        progress(step, 0.1)
        built = _build(trt, logger, plan)
        step = "open"
        progress(step, 0.5)
        engine = _open(trt, logger, built)
        step = "run"
        progress(step, 0.8)
        _run(engine)
        step = RAN
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the answer
        said = "; ".join([str(error) or repr(error), *list(messages)[-4:]])
    return asdict(Trial(name, plan, step, said, **identity(name), seconds=time.perf_counter() - start))


def identity(target: str) -> dict[str, str]:
    """What an answer is for: version of the library, GPU, compute capability, driver; empty words for what is not."""
    device = gpu() or {"gpu": "", "compute_capability": ""}
    version = installed_version(check_target(target).module) or ""
    return {"version": version, "driver": driver_version() or "", **device}


def plans(target: str) -> tuple[str, ...]:
    """The plans that are worth trying: one for this GPU alone, too, where a library builds for several."""
    try:
        library = require(check_target(target).name)
    except ImportError:
        return (PORTABLE,)
    return (PORTABLE, CURRENT) if capabilities(library) else (PORTABLE,)


def remember(trials: Sequence[Trial]) -> None:
    """Keep the answers of a GPU among the user's caches, over earlier ones for it; a full disk keeps none."""
    new = {_key(trial): trial for trial in trials if trial.gpu}
    kept = {_key(trial): trial for trial in _kept()} | new
    try:
        write_json(_file(), [asdict(trial) for trial in kept.values()])
    except OSError:
        return


def remembered(target: str) -> tuple[Trial, ...]:
    """The answers for a target with this GPU, driver and version of its library; () where it was not tried."""
    name = check_target(target).name
    here = identity(name)
    return tuple(
        trial for trial in _kept() if trial.target == name and all(getattr(trial, key) == here[key] for key in here)
    )


def runs_portably(target: str) -> str:
    """The compute capability of this GPU when a portable plan was tried on it and ran, empty otherwise."""
    found = [trial.compute_capability for trial in remembered(target) if trial.ran and trial.plan == PORTABLE]
    return found[0] if found else ""


def _file() -> Path:
    return cache_folder() / "trials.json"


def _kept() -> list[Trial]:
    try:
        return [Trial(**row) for row in read_json(_file(), list[Trial], strict=True)]
    except (InputError, OSError):  # not there, or of another version
        return []


def _key(trial: Trial) -> tuple[str, ...]:
    return (trial.target, trial.plan, trial.version, trial.gpu, trial.driver)


def _build(trt: TensorRT, logger: ILogger, plan: str) -> Buffer:
    """The plan of one 3x3 convolution in half precision."""
    import numpy as np

    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    image = network.add_input("image", trt.DataType.HALF, (1, CHANNELS, SIDE, SIDE))
    kernel = np.full((CHANNELS, CHANNELS, 3, 3), WEIGHT, np.float16)  # TensorRT reads it when it builds
    layer = network.add_convolution_nd(image, CHANNELS, (3, 3), kernel)
    result = layer.get_output(0)
    result.name = "result"
    network.mark_output(result)
    config = builder.create_builder_config()
    if plan == CURRENT:
        config.num_compute_capabilities = 1
        _checked("setting the compute capability", config.set_compute_capability(trt.ComputeCapability.CURRENT, 0))
    return _checked("building", builder.build_serialized_network(network, config))


def _open(trt: TensorRT, logger: ILogger, built: Buffer) -> ICudaEngine:
    """The engine of a plan."""
    runtime, plan = trt.Runtime(logger), bytes(memoryview(built))
    said = ""
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            said = f" (the library calls it invalid: {', '.join(reasons(trt, diagnostics))})"
    return _checked(f"opening the plan{said}", runtime.deserialize_cuda_engine(plan))


def _run(engine: ICudaEngine) -> None:
    """One run, whose values must be right."""
    import torch

    context = _checked("creating an execution context", engine.create_execution_context())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        image = torch.ones((1, CHANNELS, SIDE, SIDE), dtype=torch.float16, device="cuda")
        result = torch.zeros((1, CHANNELS, SIDE - 2, SIDE - 2), dtype=torch.float16, device="cuda")
        for name, tensor in (("image", image), ("result", result)):
            _checked(f"binding {name}", context.set_tensor_address(name, tensor.data_ptr()))
        _checked("queueing the engine", context.execute_async_v3(stream.cuda_stream))
        stream.synchronize()
        if not bool((result == EXPECTED).all()):
            raise EngineError(f"values are wrong: {float(result.min()):g} to {float(result.max()):g}, not {EXPECTED:g}")


def _checked(what: str, answer: T | None) -> T:
    """The answer of a library that says no by None or False; EngineError for those."""
    if answer is None or answer is False:
        raise EngineError(f"{what} failed")
    return answer
