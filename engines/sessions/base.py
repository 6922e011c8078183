"""Sessions: one engine each, for torch tensors in and fresh torch tensors out."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from engines.sessions.checks import Checked, check_engine
from engines.sessions.out_of_memory import OOM_ON_LOAD_HINT, OOM_ON_RUN_HINT, raise_out_of_memory, raises_out_of_memory
from engines.sessions.ranges import Fit, fit, parts, signature
from sdkd.bundle.manifest import Bundle, EngineRecord
from sdkd.bundle.onnx_weights import state_arrays, stored_weights
from sdkd.errors import EngineError
from sdkd.quantization.again import QUANTIZATION

if TYPE_CHECKING:
    import numpy as np

Rebuild = Callable[[Bundle, EngineRecord, "Mapping[str, np.ndarray]"], Bundle]
"""Builds an engine again from other weights, as the graph stores them: a bundle that holds it in the same slot."""
SHAPES = 64  # calls of so many shapes are known
COPIES = "cannot be copied or pickled, since its engine is open in this process"


class Session(ABC):
    """The engine of one component, open or opened on use: thread-safe, and a context manager that closes it."""

    device = torch.device("cpu")
    rebuild: Rebuild | None = None  # for targets that can change weights in no other way

    def __init__(self, checked: Checked) -> None:
        self.checked = checked
        self.contract = checked.contract
        self.slot = checked.record.slot
        self.ranges = checked.record.ranges
        self.limits, self.profiles = checked.limits, checked.profiles
        self.parts = lru_cache(SHAPES)(partial(parts, checked))

    @abstractmethod
    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by contract name: fresh tensors on the inputs' device; RangeError outside the built ranges."""

    @abstractmethod
    def swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Run with these weights, by state-dict name, all others as exported; EngineError where that cannot be."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine; running it afterwards is an EngineError, closing twice is harmless."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError(
            f"{type(self).__name__} {COPIES}: open another with engines.open_session(bundle, slot, component)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EngineSession(Session):
    """What all targets share: the checks of every call, one lock, and the way in and out.

    Thread-safe: calls of one session wait for one another, and one that was closed meanwhile says so. A CPU target
    reads and writes torch's memory as it is: inputs are copied only where they are not contiguous.
    """

    def __init__(self, checked: Checked) -> None:
        super().__init__(checked)
        self._fit = lru_cache(SHAPES)(partial(fit, checked))
        self._lock = threading.Lock()
        self._open = True

    @abstractmethod
    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
        """Fill `outputs` from `feeds`: contiguous tensors on this session's device, dtypes as in the contract.

        `profile`: the optimization profile that holds their shapes.
        """

    @abstractmethod
    def _release(self) -> None:
        """Drop what the target's library holds."""

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine once.

        `feeds`: tensors by contract name, in the contract's dtypes and axes, all on one device. Returns fresh tensors
        on that device that never share memory with an input or with a later call. EngineError names a tensor that does
        not fit the contract; RangeError shows the asked and the built sizes and the command that covers them;
        OutOfMemoryError leaves the session as it was, for smaller calls.
        """
        self._check_open()
        found = self._fit(signature(feeds))
        try:
            return self._run(feeds, found)
        except Exception as error:
            words = f"{self.checked.label}, run at {found.asked},"
            raise_out_of_memory(error, words, OOM_ON_RUN_HINT, on_gpu=self.device.type == "cuda")
            raise

    def _run(self, feeds: Mapping[str, torch.Tensor], found: Fit) -> dict[str, torch.Tensor]:
        origin = next(iter(feeds.values())).device
        ready = {spec.name: self._ready(feeds[spec.name]) for spec in self.contract.inputs}
        with self._lock:
            self._check_open()  # another thread may have closed it meanwhile
            outputs = self._outputs(ready, found)
        return outputs if origin == self.device else {name: tensor.to(origin) for name, tensor in outputs.items()}

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as engines read it. Asked before each change: one that changes nothing takes its time, too."""
        tensor = tensor.detach() if tensor.requires_grad else tensor
        tensor = tensor if tensor.device == self.device else tensor.to(self.device)
        return tensor if tensor.is_contiguous() else tensor.contiguous()

    def _outputs(self, feeds: dict[str, torch.Tensor], found: Fit) -> dict[str, torch.Tensor]:
        """The engine's outputs, in fresh tensors that `_execute` fills; a library may have its own."""
        outputs = self._empty_outputs(found)
        self._execute(feeds, outputs, found.profile)
        return outputs

    def _empty_outputs(self, found: Fit) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shape, dtype=dtype, device=self.device) for name, shape, dtype in found.outputs}

    def _check_open(self) -> None:
        if not self._open:
            raise EngineError(f"{self.checked.label} is closed: open it again with engines.open_session")

    def swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Run with these weights in the place of the bundle's, all others as they were exported; none: all of them.

        `weights`: by state-dict name, in state-dict shapes, any float dtype. When it fails, the session runs as before.
        Raises BundleError for names that the graph lacks, ModelError for other shapes, EngineError where this engine
        cannot change its weights.
        """
        self._check_open()
        with self._giving_weights():
            file = self.checked.graph
            stored = stored_weights(file, state_arrays(weights))
            with self._lock:
                self._check_open()
                self._swap(file, stored)

    def _giving_weights(self) -> AbstractContextManager[None]:
        """OutOfMemoryError in the words of a change of weights."""
        words = f"{self.checked.label}, given other weights,"
        return raises_out_of_memory(words, OOM_ON_LOAD_HINT, on_gpu=self.device.type == "cuda")

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        """Run with these weights, by their names in the graph, all others as exported; as before when that fails."""
        raise EngineError(f"{self.checked.label} cannot change its weights")

    def rebuilt(self, stored: Mapping[str, np.ndarray]) -> Checked:
        """The engine built again from these weights, as the graph stores them, and checked; itself when none.

        Each is built from the exported bundle, never from an engine that was rebuilt before. EngineError without
        `rebuild`.
        """
        if not stored:
            return self.checked
        record = self.checked.record
        if QUANTIZATION in record.flags:
            raise EngineError(
                f"{self.checked.label} is rounded for its own weights, and is neither refitted nor rebuilt: give a "
                f"half-precision engine the LoRA, or fuse it before: sdkd build-engine MODEL --lora FILE "
                f"--target {record.target} --precision {record.precision}"
            )
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
