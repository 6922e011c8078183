"""Whether the engines of a pipeline fit into the memory that is free, before any is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from engines.sessions.low_memory import STAGES
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import check_room, free_gpu_memory, free_memory, size, workspace
from sdkd.errors import EngineError, SdkdError

log = logging.getLogger(__name__)


def needed(bundle: Bundle, slot: str, components: Iterable[str], name: str) -> int:
    """Bytes that engines take together at their profiles' `min` or `max` sizes: all weights, the largest workspace."""
    records = [bundle.engine(slot, component) for component in components]
    weights = sum(record.total_bytes for record in records)
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
