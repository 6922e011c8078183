"""What a builder is given and what it answers: plain data that crosses the process border as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdkd.core.contract import Contract
from sdkd.errors import BuildError

Run = Callable[[Mapping[str, Any]], list[Any]]
"""Runs a saved engine: numpy arrays by input name -> numpy arrays in the contract's order of outputs."""


@dataclass(frozen=True)
class Job:
    """One engine to build: files, profiles (smallest, best, largest shape per input), and shapes to check it with."""

    component: str
    target: str
    precision: str
    onnx: str
    folder: str
    contract: Contract
    profiles: tuple[Mapping[str, Any], ...]  # each: input -> [min, opt, max] shapes
    checks: tuple[Mapping[str, int], ...]  # axis sizes, the best shape first
    flags: Mapping[str, Any] = field(default_factory=dict)
    timing_cache: str = ""  # a file's name in the folder; empty where the library keeps none
    bundle: str = ""  # of an engine of eight bits, which is held against whole images
    keep_slower: bool = False  # such an engine, though it is not faster than the target's half precision

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Job:
        """The inverse of `to_json`."""
        changed = {name: tuple(data[name]) for name in ("profiles", "checks")}
        return Job(**{**data, **changed, "contract": Contract.from_json(data["contract"])})

    def file(self, suffix: str) -> Path:
        """Where the builder writes, e.g. `<folder>/unet.engine`."""
        return Path(self.folder) / f"{self.component}{suffix}"

    def profile_for(self, feeds: Mapping[str, Any]) -> int:
        """The first profile that holds the shapes of these arrays."""

        def holds(profile: Mapping[str, Any]) -> bool:
            shapes = ((array.shape, profile[name]) for name, array in feeds.items())
            return all(
                low <= size <= high
                for shape, (least, _, most) in shapes
                for low, size, high in zip(least, shape, most, strict=True)
            )

        return next(index for index, profile in enumerate(self.profiles) if holds(profile))

    def weight_bytes(self) -> int:
        """Size of the ONNX graph and its weights."""
        return sum(file.stat().st_size for file in Path(self.onnx).parent.glob("model.onnx*"))


@dataclass(frozen=True)
class Built:
    """What a builder made: file names in the job's folder (the engine first), what it found out, how to run it."""

    files: tuple[str, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)
    built_for: tuple[str, ...] = ()
    run: Run | None = None  # None: cannot run where it was built
    reference: Run | None = None  # what it is compared with; None: the graph


def check_io(job: Job, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """BuildError unless a graph's tensor names and dtypes (torch's names) are the contract's."""
    for kind, found, specs in (("input", inputs, job.contract.inputs), ("output", outputs, job.contract.outputs)):
        expected = {spec.name: spec.dtype for spec in specs}
        if dict(found) != expected:
            raise BuildError(
                f"{job.component} for {job.target}: the graph's {kind}s are {_listed(found)}, "
                f"the bundle's contract says {_listed(expected)}: export the model again"
            )


def _listed(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in tensors.items()) or "none"
