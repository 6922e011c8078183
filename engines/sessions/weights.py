"""What the weights of an opened engine are: the bundle's, another checkpoint's of the same architecture, plus adapters.

Nothing is ever added to what is in the engine: each change starts from the bundle's own weights, so that B after A is B
and not A + B, and taking everything away gives the engine that was opened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sdkd.bundle.onnx_weights import torch_weights
from sdkd.bundle.onnx_weights import weight_names as graph_weights
from sdkd.errors import ModelError

if TYPE_CHECKING:
    from engines.sessions.base import Session

Delta = Callable[[], torch.Tensor]
"""What adapters add to one weight, computed when called: float32, in the weight's own shape."""


@dataclass(frozen=True)
class WantedWeights:
    """What the weights are to be; `version` counts the changes."""

    checkpoint: Mapping[str, torch.Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    scale: float = 1.0  # of the deltas
    version: int = 0

    def same(self, other: WantedWeights) -> bool:
        """Whether both give the same weights: a scale that comes back asks for nothing new."""
        equal = self.checkpoint is other.checkpoint and self.deltas is other.deltas
        return equal and (self.scale == other.scale or not self.deltas)


class EngineWeights:
    """The weights of one session; changes are made at the next run, all at once. Thread-safe.

    `partial`: engines of the same component's layers, some of them, which get the same weights before it.
    """

    def __init__(self, session: Session, partial: Sequence[Session] = ()) -> None:
        self.session, self.partial = session, tuple(partial)
        self._wanted = WantedWeights()  # replaced as a whole, never changed
        self._applied = self._wanted  # what the engine holds
        self._changed = False  # whether the engine holds other weights than the bundle's
        self._setting, self._applying = threading.Lock(), threading.Lock()

    @property
    def version(self) -> int:
        """Counts the changes, applied or pending."""
        return self._wanted.version

    @property
    def checkpoint(self) -> Mapping[str, torch.Tensor]:
        """Other weights than the bundle's, applied or pending, by state-dict name; empty for the bundle's own."""
        return self._wanted.checkpoint

    def use(self, state: Mapping[str, torch.Tensor]) -> None:
        """Other weights of the same architecture, by state-dict name; none: the bundle's own."""
        with self._setting:
            self._wanted = replace(self._wanted, checkpoint=dict(state), version=self.version + 1)

    def add(self, deltas: Mapping[str, Delta]) -> None:
        """What adapters add; nothing: no adapter."""
        with self._setting:
            if deltas or self._wanted.deltas:
                self._wanted = replace(self._wanted, deltas=dict(deltas), version=self.version + 1)

    def scale(self, factor: float) -> None:
        """What adapters add, times this, until it is set again."""
        with self._setting:
            if factor != self._wanted.scale:
                self._wanted = replace(self._wanted, scale=factor, version=self.version + 1)

    def apply_pending(self) -> None:
        """Give the engine the weights that were set; when that fails, they are still pending at the next run."""
        with self._applying:  # what is set meanwhile counts at the next run
            wanted = self._wanted
            if wanted.same(self._applied):
                return
            if wanted.checkpoint or wanted.deltas or self._changed:
                self._swap(self._weights_of(wanted))
            self._changed, self._applied = bool(wanted.checkpoint or wanted.deltas), wanted

    def _swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        try:
            for session in self.partial:
                session.swap({name: weights[name] for name in weight_names(session) if name in weights})
            self.session.swap(weights)
        except BaseException:
            if self.partial:  # one may have them and the other not: both get theirs at the next run, whatever is wanted
                self._applied, self._changed = WantedWeights(), True
            raise

    def changed(self) -> dict[str, torch.Tensor]:
        """The weights that differ from the bundle's, by state-dict name."""
        return self._weights_of(self._wanted)

    def _weights_of(self, wanted: WantedWeights) -> dict[str, torch.Tensor]:
        exported = [name for name in wanted.deltas if name not in wanted.checkpoint]
        base: dict[str, Any] = {name: wanted.checkpoint[name] for name in wanted.deltas if name in wanted.checkpoint}
        if exported:
            base |= torch_weights(self.session.checked.graph, exported)
        return dict(wanted.checkpoint) | {
            name: base[name].float() + wanted.scale * delta() for name, delta in wanted.deltas.items()
        }


def weight_names(session: Session) -> set[str]:
    """The weights that a session's graph has, by state-dict name."""
    return graph_weights(session.checked.graph)


def check_state(session: Session, state: Mapping[str, torch.Tensor]) -> None:
    """ModelError unless these are the weights, by name, that a session's graph has."""
    names = weight_names(session)
    missing, unknown = sorted(names - set(state)), sorted(set(state) - names)
    if missing or unknown:
        raise ModelError(
            f"these weights do not fit the {session.checked.record.component} of {str(session.checked.bundle.path)!r}: "
            f"{len(missing)} are missing and {len(unknown)} unknown (first: {(missing or unknown)[0]}): "
            "give a model of the same architecture"
        )
