"""What an export will take, before minutes are spent: memory and disk, against what there is.

    memory = 0.5 GB + the largest module in float32; without the comparison with PyTorch in the graph's precision
    disk   = the weights of every component in the graph's precision

From the configs alone, so that nothing is loaded for it. The estimate stays below what was measured: it refuses only
what cannot go well.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.component import ExportOptions
from export.graph.components import component_state
from export.source import Source
from sdkd.bundle.memory import BYTES, check_room, free_memory, size
from sdkd.core.components import CACHED_UNET, CONFIG_FOLDERS
from sdkd.errors import ExportError

BASE_BYTES = 500_000_000
LARGE = 4_000_000_000  # bytes of memory from which a user is told before it starts


@dataclass(frozen=True)
class Room:
    """What an export takes, in bytes, and which component takes the most memory."""

    memory: int
    disk: int
    largest: str

    def __str__(self) -> str:
        return f"needs about {size(self.memory)} of memory ({self.largest} most of all) and {size(self.disk)} of disk"


def estimate(source: Source, names: Sequence[str], options: ExportOptions) -> Room:
    """What exporting these components takes; see the formula above."""
    counts = {name: _parameters(source, name) for name in names}
    each = BYTES[options.precision]
    held = BYTES["fp32"] if options.verify else each
    largest = max(counts, key=counts.__getitem__)
    return Room(BASE_BYTES + held * counts[largest], each * sum(counts.values()), largest)


def _parameters(source: Source, name: str) -> int:
    """Parameters of a component; 0 where its config is not known, and of a part of another component."""
    outline = None if name == CACHED_UNET else source.outline(CONFIG_FOLDERS[name])
    return 0 if outline is None else sum(tensor.numel() for tensor in component_state(name, outline).values())


def check_export_room(source: Source, names: Sequence[str], options: ExportOptions, place: Path) -> Room:
    """What an export into a folder takes; ExportError, with the numbers and what to do, when there is not so much."""
    room = estimate(source, names, options)
    advice = "close other programs, or export with " + (
        "--precision fp16" if options.precision == "fp32" else "--no-verify" if options.verify else "fewer components"
    )
    check_room(f"the export, {room.largest} most of all,", "memory", room.memory, free_memory(), advice, ExportError)
    free = shutil.disk_usage(place).free
    check_room(f"graphs in {str(place)!r}", "disk space", room.disk, free, "free some, or choose another", ExportError)
    return room
