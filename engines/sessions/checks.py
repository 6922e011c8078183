"""Checks of an engine before it is deserialised, and what a session must know about one that passed.

Their order is the point: an engine that is missing, damaged, stale or foreign is refused with one sentence, since the
libraries answer such a file with None or a crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sdkd.bundle.manifest import Bundle, ComponentRecord, EngineRecord
from sdkd.core.components import UNETS
from sdkd.core.contract import Contract, latent_multiple
from sdkd.core.profiles import Range, Shapes, axis_ranges, profile_shapes
from sdkd.errors import BundleError, EngineError
from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import check_target, environment, require

T = TypeVar("T")
TEXT = "sequence"  # the work goes by images or latents, though text may have more elements


class Profiles(tuple[Mapping[str, Range], ...]):
    """Ranges of each dynamic axis (in the contract's units), profile by profile in the engine's order."""

    __slots__ = ()

    def pick(self, sizes: Mapping[str, int]) -> int | None:
        """The profile that holds all sizes and has the smallest largest images; None when none holds them."""
        fitting = [index for index in range(len(self)) if self._holds(index, sizes)]
        return min(fitting, key=self._volume, default=None)

    def largest_batch(self, sizes: Mapping[str, int]) -> int | None:
        """The largest batch of the profiles that hold these other sizes; None when none does."""
        others = {axis: size for axis, size in sizes.items() if axis != "batch"}
        return max((self[index]["batch"].max for index in range(len(self)) if self._holds(index, others)), default=None)

    def _holds(self, index: int, sizes: Mapping[str, int]) -> bool:
        return all(size in self[index][axis] for axis, size in sizes.items())

    def _volume(self, index: int) -> int:
        ranges = self[index]
        axes = [axis for axis in ranges if axis != TEXT] if any("height" in axis for axis in ranges) else list(ranges)
        return math.prod(ranges[axis].max for axis in axes)


@dataclass(frozen=True)
class Checked:
    """An engine that passed every check that needs no deserialising, and what a session must know about it."""

    bundle: Bundle
    record: EngineRecord
    contract: Contract
    limits: Mapping[str, Range]  # of each dynamic axis of the inputs, over all profiles
    steps: Mapping[str, int]  # an axis must be a multiple of its step
    scale: int  # pixels per latent
    profiles: Profiles  # in the record's order, which is the engine's

    @property
    def path(self) -> Path:
        """The file to open; the record's flags say how."""
        return self.bundle.path / self.record.files[0].path

    @property
    def graph(self) -> Path:
        """The exported graph that the engine was built from, its files verified once."""
        component = self.bundle.component(self.record.component)
        verify_once(self.bundle, component)
        return self.bundle.path / component.files[0].path

    @property
    def label(self) -> str:
        """How messages call this engine."""
        return f"the {self.record.slot} engine of {self.record.component} in {str(self.bundle.path)!r}"


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
    return Checked(bundle, record, contract, limits, _steps(bundle, contract), scale, Profiles(profiles))


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
    if contract.component in (*UNETS, "controlnet"):
        down = latent_multiple(bundle.config(contract.component))
        steps = {axis: step * down for axis, step in steps.items()}
    return {axis: step for axis, step in steps.items() if axis in contract.axis_names()}


def of_newest(bundle: Bundle, slot: str, component: str, act: Callable[[Bundle], T]) -> T:
    """`act` with a bundle, and again with its newest engine when that fails and one was built since it was opened.

    A builder removes the files that its manifest replaced.
    """
    while True:
        try:
            return act(bundle)
        except (BundleError, EngineError, OSError):
            again = _built_again(bundle, slot, component)
            if again is None:
                raise
            bundle = again


def _built_again(bundle: Bundle, slot: str, component: str) -> Bundle | None:
    """The bundle with the engine that it has now, of the same exported component; None when it is the one it had."""
    try:
        now = Bundle.open(bundle.path)
        record, exported = now.engine(slot, component), now.component(component)
    except BundleError:
        return None
    then = bundle.manifest
    same = then.engines.get(f"{slot}/{component}") == record or then.components.get(component) != exported
    return None if same else replace(bundle, manifest=then.with_engine(record))


def profile_of(checked: Checked) -> dict[str, Shapes]:
    """Smallest, best and largest shape of every input, of a target with one profile."""
    return profile_shapes(checked.contract, checked.profiles[0])


def check_names(checked: Checked, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """EngineError unless an opened engine has exactly the contract's tensors."""
    for kind, specs, found in (
        ("inputs", checked.contract.inputs, set(inputs)),
        ("outputs", checked.contract.outputs, set(outputs)),
    ):
        wanted = {spec.name for spec in specs}
        if found != wanted:
            raise EngineError(f"{checked.label} has {kind} {sorted(found)} instead of {sorted(wanted)}: build it again")
