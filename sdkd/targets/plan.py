"""What engines are wished for, decided once: target, their precision, that of the ONNX graphs, and their slot."""

from __future__ import annotations

from dataclasses import dataclass

from sdkd.core.contract import (
    PRECISIONS,
    QUANTIZED,
    EnginePrecision,
    Precision,
    check_engine_precision,
    check_precision,
)
from sdkd.errors import InputError
from sdkd.targets.registry import TARGETS, Target, check_target, slot_name, slot_precision, usual_precision


@dataclass(frozen=True)
class EnginePlan:
    """Engines of a target in a precision, built from ONNX graphs of precision `onnx`; InputError where it cannot."""

    target: Target
    precision: EnginePrecision
    onnx: Precision

    def __post_init__(self) -> None:
        target = self.target
        if self.onnx == "bf16" and not target.takes_bf16:
            raise InputError(
                f"the ONNX graph is bf16, which {target.name} cannot run: export it with --precision fp32 "
                f"(and build with --target openvino --precision bf16 for bf16 arithmetic on a CPU)"
            )
        if self.precision in QUANTIZED:
            self._check_quantized()
        elif self.precision != self.onnx and self.precision not in dict(target.converts).get(self.onnx, ()):
            raise InputError(
                f"{target.name} cannot make a {self.precision} engine from an {self.onnx} graph (it runs the graph's "
                f"own precision): export the model again with --precision {self.precision}"
            )

    def _check_quantized(self) -> None:
        target = self.target
        if self.precision not in target.quantizes:
            others = [one.name for one in TARGETS.values() if self.precision in one.quantizes]
            raise InputError(
                f"{target.name} has no {self.precision} (it has {', '.join((*_floats(target), *target.quantizes))}): "
                f"choose one of those, or a target that has it: {', '.join(others)}"
            )
        if self.onnx != target.precision:
            raise InputError(
                f"{target.name} makes {self.precision} engines from {target.precision} graphs, these are {self.onnx}: "
                f"export the model again with --precision {target.precision}"
            )

    @property
    def slot(self) -> str:
        """Where the engines are kept in a bundle."""
        return slot_name(self.target.name, self.precision, self.onnx)


def plan_for_model(target: str, precision: str | None = None) -> EnginePlan:
    """The plan for a model that is exported for its engines.

    `target`: a target or slot (`openvino-bf16`); `precision`: None for the slot's, or what the target's users want.
    InputError for an unknown target or precision, and for two precisions.
    """
    found, named = check_target(target), _named(target, precision)
    wanted = check_engine_precision(named or usual_precision(found))
    graph = found.precision if wanted in QUANTIZED else found.exported_in or wanted
    return EnginePlan(found, wanted, check_precision(graph))


def plan_for_onnx(target: str, precision: str | None, onnx: str, where: str) -> EnginePlan:
    """The plan for a bundle whose graphs are there, in precision `onnx`; InputError as above, and where they don't fit.

    `precision`: None for the slot's, or the graphs' own. `where` names the bundle in messages.
    """
    found, named = check_target(target), _named(target, precision)
    if usual_precision(found) == "fp16" and onnx == "fp32" and not named:
        raise InputError(
            f"{where} is fp32, which {found.name} would build as a slow fp32 engine: "
            f"export it with --precision fp16, or say --precision fp32 if you mean it"
        )
    return EnginePlan(found, check_engine_precision(named or onnx), check_precision(onnx))


def _floats(target: Target) -> list[str]:
    """Float precisions of a target's engines, whatever the graph's."""
    made = {target.precision, *(one for _, others in target.converts for one in others)}
    own = {name for name in PRECISIONS if target.exported_in is None and (target.takes_bf16 or name != "bf16")}
    return [name for name in PRECISIONS if name in made | own]


def _named(target: str, asked: str | None) -> str | None:
    """The precision that is asked for, or named by the slot."""
    named = slot_precision(target)
    if named and asked and named != asked:
        raise InputError(f"target {target!r} means precision {named!r}, but {asked!r} was asked for: give one of them")
    return asked or named
