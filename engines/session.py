"""Sessions: one opened engine each, for torch tensors in and fresh torch tensors out; checked before it is opened.

The order of checks is the point: an engine that is missing, damaged, stale or foreign is refused with one sentence
before anything is deserialised, since the libraries answer such a file with None or a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from engines.closing import Closing
from engines.out_of_memory import once_more, told_of_memory
from engines.ranges import check_sizes, output_sizes
from engines.slots import of_newest
from sdkd.bundle import Bundle, ComponentRecord, EngineRecord
from sdkd.contract import Contract, TensorSpec, axis_ranges, latent_multiple
from sdkd.errors import EngineError
from sdkd.onnx_weights import state_arrays, stored_weights
from sdkd.profiles import Range, ShapeRanges
from sdkd.targets import check_target, environment, gpu, require

if TYPE_CHECKING:
    import numpy as np

OPENERS = {
    "onnxruntime": ("engines.session_onnxruntime", "OnnxRuntimeSession"),
    "openvino": ("engines.session_openvino", "OpenVinoSession"),
    "tensorrt": ("engines.session_tensorrt", "TensorRTSession"),
    "tensorrt-rtx": ("engines.session_tensorrt", "TensorRTSession"),
}

ROOM = "Close other programs, or open the engines in turn: low_memory=True"
SMALLER = "Ask for fewer images at once or a smaller size, or close other programs"
Rebuild = Callable[[Bundle, EngineRecord, "Mapping[str, np.ndarray]"], Bundle]
"""Builds an engine again from other weights, as the graph stores them: a bundle that holds it in the same slot."""


class Session(Protocol):
    """An opened engine of one component: thread-safe, and a context manager that closes it."""

    checked: Checked
    contract: Contract
    slot: str
    ranges: ShapeRanges
    limits: Mapping[str, Range]
    device: torch.device
    rebuild: Rebuild | None
    profiles: tuple[Mapping[str, Range], ...]

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by contract name: fresh tensors on the inputs' device; RangeError outside the built ranges."""
        ...

    def swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Run with these weights, by state-dict name, all others as exported; EngineError where that cannot be."""
        ...

    def close(self) -> None:
        """Release the engine; running it afterwards is an EngineError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Checked:
    """An engine that passed every check that needs no deserialising, and what a session must know about it."""

    bundle: Bundle
    record: EngineRecord
    contract: Contract
    limits: Mapping[str, Range]  # of each dynamic axis of the inputs, over all profiles
    steps: Mapping[str, int]  # an axis must be a multiple of its step
    scale: int  # pixels per latent
    profiles: tuple[Mapping[str, Range], ...]  # limits of each profile, in the record's order

    @property
    def path(self) -> Path:
        """The file to open; the record's flags say how."""
        return self.bundle.path / self.record.files[0].path

    @property
    def label(self) -> str:
        """How messages call this engine."""
        return f"the {self.record.slot} engine of {self.record.component} in {str(self.bundle.path)!r}"


def expected_device(target: str) -> torch.device:
    """Where a target's sessions keep their tensors here; the CPU, too, where the GPU that they need is missing."""
    if target == "onnxruntime":
        from engines.session_onnxruntime import CUDA, providers

        on_gpu = providers()[0] == CUDA
    else:
        on_gpu = check_target(target).runs_on_gpu
    if on_gpu and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_gpu(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU torch's current one, where sessions open; nothing for another device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_verified: set[tuple[str, int, int, str]] = set()


def check_engine(bundle: Bundle, slot: str, component: str) -> Checked:
    """Refuse an engine that cannot run here, before it is deserialised.

    In this order: BundleError when it is not recorded, or a file is missing, truncated or altered; MissingExtraError;
    StaleEngineError when weights, versions or device differ; EngineError without the GPU that it needs.
    """
    record = bundle.engine(slot, component)
    verify_once(bundle, record)
    require(record.target)
    bundle.check_fresh(record, environment(record.target))
    bundle.verify_weights(record)
    if check_target(record.target).runs_on_gpu and gpu() is None:
        raise EngineError(
            f"the {slot} engine of {component} needs an NVIDIA GPU with a driver, and torch sees none here: run it on "
            f"such a machine, or build one for this machine: {bundle.build_command('onnxruntime')}"
        )
    scale = bundle.scale()
    contract = bundle.component(component).contract
    limits, *profiles = (
        axis_ranges(contract, ranges, scale, bundle.positions()) for ranges in (record.ranges, *record.profiles)
    )
    return Checked(bundle, record, contract, limits, _steps(bundle, contract), scale, tuple(profiles))


def open_session(bundle: Bundle | str | Path, slot: str, component: str, **options: Any) -> EngineSession:
    """Check and open one engine of a bundle; `options` are the target's own (e.g. `threads`).

    Raises what `check_engine` raises, and EngineError when the target's library refuses the engine after all:
    OutOfMemoryError for want of memory, after what torch keeps in store was given back.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return of_newest(opened, slot, component, lambda current: _open(current, slot, component, **options))


def _open(opened: Bundle, slot: str, component: str, **options: Any) -> EngineSession:
    checked = check_engine(opened, slot, component)
    module, name = OPENERS[checked.record.target]
    kind: Callable[..., EngineSession] = getattr(importlib.import_module(module), name)
    with told_of_memory(f"opening {checked.label}", ROOM, on_gpu=expected_device(checked.record.target).type == "cuda"):
        return once_more(lambda: kind(checked, **options))


def verify_once(bundle: Bundle, record: ComponentRecord | EngineRecord) -> None:
    """Hash each file once per process, as long as its size and time of change stay the same."""
    keys = set()
    for file in record.files:
        path = (bundle.path / file.path).resolve()
        stat = path.stat() if path.is_file() else None
        keys.add((str(path), stat.st_size if stat else -1, stat.st_mtime_ns if stat else -1, file.sha256))
    if not keys <= _verified:
        bundle.verify_files(record)
        if isinstance(record, ComponentRecord):  # an engine's file is not read before it is known to fit
            bundle.verify_weights(record)
        _verified.update(keys)


def _steps(bundle: Bundle, contract: Contract) -> dict[str, int]:
    """What latents and pixels must be a multiple of: exported graphs have no odd sizes at any level."""
    steps = {"height": 1, "width": 1, "image_height": bundle.scale(), "image_width": bundle.scale()}
    if contract.component in ("unet", "controlnet"):
        down = latent_multiple(bundle.config(contract.component))
        steps = {axis: step * down for axis, step in steps.items()}
    return {axis: step for axis, step in steps.items() if axis in contract.axis_names()}


class EngineSession(Closing, ABC):
    """What all targets share: the checks of every call, one lock, and the way in and out.

    Thread-safe: calls of one session wait for one another, and one that was closed meanwhile says so. A CPU target
    reads and writes torch's memory as it is: inputs are copied only where they are not contiguous.
    """

    device = torch.device("cpu")
    rebuild: Rebuild | None = None  # for targets that can change weights in no other way

    def __init__(self, checked: Checked) -> None:
        self.checked = checked
        self.contract = checked.contract
        self.slot = checked.record.slot
        self.ranges = checked.record.ranges
        self.limits, self.profiles = checked.limits, checked.profiles
        self._lock = threading.Lock()
        self._open = True

    @abstractmethod
    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        """Fill `outputs` from `feeds`: contiguous tensors on this session's device, dtypes as in the contract."""

    @abstractmethod
    def _release(self) -> None:
        """Drop what the target's library holds."""

    @torch.no_grad()
    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine once.

        `feeds`: tensors by contract name, in the contract's dtypes and axes, all on one device. Returns fresh tensors
        on that device that never share memory with an input or with a later call. EngineError names a tensor that does
        not fit the contract; RangeError shows the asked and the built sizes and the command that covers them;
        OutOfMemoryError leaves the session as it was, for smaller calls.
        """
        self._check_open()
        sizes = self._sizes(feeds)
        check_sizes(self.checked, sizes)
        asked = ", ".join(f"{axis} {count}" for axis, count in sizes.items()) or "its fixed sizes"
        with told_of_memory(f"{self.checked.label}, run at {asked},", SMALLER, on_gpu=self.device.type == "cuda"):
            return self._run(feeds, sizes)

    def _run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        origin = next(iter(feeds.values())).device
        ready = {spec.name: feeds[spec.name].detach().to(self.device).contiguous() for spec in self.contract.inputs}
        every = output_sizes(self.contract, sizes, self.checked.scale)
        outputs = {
            spec.name: torch.empty(spec.shape(every), dtype=torch_dtype(spec.dtype), device=self.device)
            for spec in self.contract.outputs
        }
        with self._lock:
            self._check_open()  # another thread may have closed it meanwhile
            self._execute(ready, outputs)
        return {name: tensor.to(origin) for name, tensor in outputs.items()}

    def _check_open(self) -> None:
        if not self._open:
            raise EngineError(f"{self.checked.label} is closed: open it again with engines.session.open_session")

    def _sizes(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Size of each dynamic axis, after names, dtypes, ranks and fixed axes were found right."""
        wanted = [spec.name for spec in self.contract.inputs]
        if set(feeds) != set(wanted):
            raise EngineError(f"{self.checked.label} takes {', '.join(wanted)}, not {', '.join(feeds) or 'nothing'}")
        sizes: dict[str, int] = {}
        for spec in self.contract.inputs:
            self._check_tensor(spec, feeds[spec.name])
            for position, axis in spec.dynamic_axes.items():
                size = feeds[spec.name].shape[position]
                if sizes.setdefault(axis, size) != size:
                    raise EngineError(f"input {spec.name!r} has {axis} {size}, another input has {sizes[axis]}")
        return sizes

    def _check_tensor(self, spec: TensorSpec, tensor: torch.Tensor) -> None:
        if tensor.dtype != torch_dtype(spec.dtype):
            raise EngineError(f"input {spec.name!r} is {tensor.dtype}, {self.checked.label} takes {spec.dtype}")
        same_rank = len(tensor.shape) == len(spec.axes)
        if not same_rank or any(
            isinstance(axis, int) and axis != size for axis, size in zip(spec.axes, tensor.shape, strict=True)
        ):
            wanted = ", ".join(str(axis) for axis in spec.axes)
            fixed = ": its shapes were fixed by --static, export the model again without it"
            raise EngineError(
                f"input {spec.name!r} has shape {tuple(tensor.shape)}, {self.checked.label} takes ({wanted})"
                f"{fixed if same_rank and not spec.dynamic_axes else ''}"
            )

    def swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Run with these weights in the place of the bundle's, all others as they were exported; none: all of them.

        `weights`: by state-dict name, in state-dict shapes, any float dtype. When it fails, the session runs as before.
        Raises BundleError for names that the graph lacks, ModelError for other shapes, EngineError where this engine
        cannot change its weights.
        """
        self._check_open()
        component = self.checked.bundle.component(self.checked.record.component)
        verify_once(self.checked.bundle, component)
        file = self.checked.bundle.path / component.files[0].path
        stored = stored_weights(file, state_arrays(weights))
        words = f"{self.checked.label}, given other weights,"
        with self._lock, told_of_memory(words, ROOM, on_gpu=self.device.type == "cuda"):
            self._check_open()
            self._swap(file, stored)

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        raise EngineError(f"{self.checked.label} cannot change its weights")

    def rebuilt(self, stored: Mapping[str, np.ndarray]) -> Checked:
        """The engine built again from these weights, as the graph stores them, and checked; itself when none.

        Each is built from the exported bundle, never from an engine that was rebuilt before. EngineError without
        `rebuild`.
        """
        if not stored:
            return self.checked
        if self.rebuild is None:
            raise EngineError(
                f"{self.checked.label} was built for its own weights: build it with --refit lora (or all, for whole "
                f"checkpoints), or give rebuild=sdkd.workflow.rebuild to plug or load_pipeline"
            )
        again = self.rebuild(self.checked.bundle, self.checked.record, stored)
        return check_engine(again, self.slot, self.checked.record.component)

    def close(self) -> None:
        """Release the engine; closing twice is harmless."""
        with self._lock:
            if self._open:
                self._open = False
                self._release()


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a contract's dtype name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_names(checked: Checked, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """EngineError unless an opened engine has exactly the contract's tensors."""
    for kind, specs, found in (
        ("inputs", checked.contract.inputs, set(inputs)),
        ("outputs", checked.contract.outputs, set(outputs)),
    ):
        wanted = {spec.name for spec in specs}
        if found != wanted:
            raise EngineError(f"{checked.label} has {kind} {sorted(found)} instead of {sorted(wanted)}: build it again")
