"""Low-memory mode: only the engines of one stage of a pipeline are open at a time; and what fits into free memory.

A pipeline runs its text encoders, then its UNet (with a ControlNet) many times, then its VAE: the memory of one stage
is enough, for the price of opening each engine once a call.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch

from engines.sessions.base import EngineSession, Session
from engines.sessions.checks import Checked, check_engine, of_newest
from engines.sessions.opening import expected_device, on_gpu, open_session
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import check_room, free_gpu_memory, free_memory, resident_bytes, size, workspace
from sdkd.core.components import TEXT_ENCODERS, UNETS
from sdkd.errors import EngineError, SdkdError

log = logging.getLogger(__name__)
STAGES = (TEXT_ENCODERS, (*UNETS, "controlnet"), ("vae_decoder", "vae_encoder"))


def stage(component: str) -> tuple[str, ...]:
    """The components that are open together with this one."""
    return next(group for group in STAGES if component in group)


class StagedEngines:
    """The engines of one slot of a bundle, those of one stage open; thread-safe: calls wait for one another."""

    def __init__(self, bundle: Bundle, slot: str) -> None:
        self.bundle, self.slot = bundle, slot
        self.lock = threading.RLock()
        # They hold this: without a cycle, engines are freed as soon as their pipeline is.
        self._sessions: weakref.WeakValueDictionary[str, StagedSession] = weakref.WeakValueDictionary()

    def session(self, component: str) -> StagedSession:
        """A session that opens when it runs; raises now what `check_engine` raises."""
        checked = of_newest(self.bundle, self.slot, component, lambda now: check_engine(now, self.slot, component))
        found = StagedSession(self, checked)
        self._sessions[component] = found
        return found

    def close_others(self, component: str) -> None:
        """Release the engines of every other stage."""
        for name, session in self._sessions.items():
            if name not in stage(component):
                session.pause()


class StagedSession(Session):
    """An engine that is open while its stage runs; weights that it was given are given again when it is opened."""

    def __init__(self, stages: StagedEngines, checked: Checked) -> None:
        super().__init__(checked)
        self._stages = stages
        self.device = expected_device(checked.record.target)
        self._weights: Mapping[str, torch.Tensor] = {}
        self._session: EngineSession | None = None
        self._closed = False

    def _opened(self) -> EngineSession:
        if self._closed:
            raise EngineError(f"{self.checked.label} is closed: open it again with engines.open_session")
        component = self.checked.record.component
        if self._session is None:
            self._stages.close_others(component)
            with on_gpu(self.device):
                session = open_session(self._stages.bundle, self.slot, component)
            session.rebuild = self.rebuild
            if self._weights:
                session.swap(self._weights)
            self._session = session
        return self._session

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Open the engine if it is not, after those of other stages were released, and run it."""
        with self._stages.lock:
            return self._opened().run(feeds)

    def swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        """As every session, now and whenever the engine is opened again."""
        with self._stages.lock:
            self._opened().swap(weights)
            self._weights = dict(weights)

    def pause(self) -> None:
        """Release the engine until the next run."""
        with self._stages.lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def close(self) -> None:
        """Release the engine; running it afterwards is an EngineError."""
        with self._stages.lock:
            self.pause()
            self._closed = True


def needed(bundle: Bundle, slot: str, components: Iterable[str], name: str) -> int:
    """Bytes that engines take together at their profiles' `min` or `max` sizes: all weights, the largest workspace."""
    records = [bundle.engine(slot, component) for component in components]
    weights = sum(resident_bytes(bundle, record) for record in records)
    return weights + max((workspace(bundle, record, name) for record in records), default=0)


def check_memory(bundle: Bundle, slot: str, components: Sequence[str], device: str, low_memory: bool) -> None:
    """EngineError when even the smallest built sizes cannot fit into free memory; a warning when the largest do not.

    With `low_memory` one stage is open at a time, and the largest counts. Where the bundle's configs do not say
    how large tensors get, nothing is checked.
    """
    groups = [[name for name in stage if name in components] for stage in STAGES] if low_memory else [components]
    try:
        least, most = (max(needed(bundle, slot, group, name) for group in groups) for name in ("min", "max"))
    except (SdkdError, KeyError):
        return
    kind, free = ("GPU memory", free_gpu_memory()) if device == "cuda" else ("memory", free_memory())
    what = f"the {slot} engines of {str(bundle.path)!r}"
    ways = "close other programs" if low_memory else "pass low_memory=True, which opens them in turn, or close others"
    check_room(what, kind, least, free, ways, EngineError)
    if most > free:
        log.warning(
            "%s need about %s of %s at their largest sizes, and %s are free", what, size(most), kind, size(free)
        )
