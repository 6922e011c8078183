"""What an export will take, before minutes are spent: memory and disk, against what there is.

    memory = 0.5 GB + the largest module in float32; without the comparison with PyTorch in the graph's precision
    disk   = the weights of every component in the graph's precision

With the engines that are built of it next, what those take at any image size, too (`export.build.estimate`). From the
configs alone, so that nothing is loaded for it. The estimate stays below what was measured: it refuses only what cannot
go well.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.build.estimate import host_memory
from export.component import ExportOptions
from export.graph.components import component_state
from export.source import Source
from sdkd.bundle.memory import BYTES, check_room, free_memory, size
from sdkd.core.components import CACHED_UNET, CONFIG_FOLDERS
from sdkd.errors import ExportError
from sdkd.targets.plan import EnginePlan

BASE_BYTES = 500_000_000
LARGE = 4_000_000_000  # bytes of memory from which a user is told before it starts


@dataclass(frozen=True)
class Engines:
    """What is built of an export next, on the same machine: engines as planned, of some components or of all."""

    plan: EnginePlan
    components: Sequence[str] | None = None

    def of(self, name: str) -> bool:
        """Whether a component's engine is built."""
        return self.components is None or name in self.components


@dataclass(frozen=True)
class Room:
    """What an export takes, in bytes, and which component takes the most memory."""

    memory: int
    disk: int
    largest: str
    building: bool = False  # whether its engine takes that memory, and not the export

    def __str__(self) -> str:
        return f"needs about {size(self.memory)} of memory ({self.largest} most of all) and {size(self.disk)} of disk"


def estimate(source: Source, names: Sequence[str], options: ExportOptions, engines: Engines | None = None) -> Room:
    """What exporting these components, and building engines of them, takes; see the formula above."""
    counts = {name: _parameters(source, name) for name in names}
    largest = max(counts, key=counts.__getitem__)
    each = BYTES[options.precision]
    held = BYTES["fp32"] if options.verify else each
    export = Room(BASE_BYTES + held * counts[largest], each * sum(counts.values()), largest)
    built = {name: count for name, count in counts.items() if engines is not None and engines.of(name)}
    if engines is None or not built:
        return export
    disk = export.disk + BYTES[engines.plan.precision] * sum(built.values())
    heaviest = max(built, key=built.__getitem__)
    memory = host_memory(each * built[heaviest])
    return Room(memory, disk, heaviest, True) if memory > export.memory else replace(export, disk=disk)


def _parameters(source: Source, name: str) -> int:
    """Parameters of a component; 0 where its config is not known, and of a part of another component."""
    outline = None if name == CACHED_UNET else source.outline(CONFIG_FOLDERS[name])
    return 0 if outline is None else sum(tensor.numel() for tensor in component_state(name, outline).values())


def check_export_room(
    source: Source, names: Sequence[str], options: ExportOptions, place: Path, engines: Engines | None = None
) -> Room:
    """What an export into a folder takes; ExportError, with the numbers and what to do, when there is not so much.

    `engines`: what is built of it next.
    """
    room = estimate(source, names, options, engines)
    what = f"the {'builds' if room.building else 'exports'}, {room.largest} most of all,"
    advice = f"close other programs, or {_less(room, options, engines)}"
    check_room(what, "memory", room.memory, free_memory(), advice, ExportError)
    what = f"graphs in {str(place)!r}" if engines is None else f"graphs and engines in {str(place)!r}"
    free = shutil.disk_usage(place).free
    check_room(what, "disk space", room.disk, free, "free some, or choose another", ExportError)
    return room


def _less(room: Room, options: ExportOptions, engines: Engines | None) -> str:
    """What takes less memory."""
    if room.building and engines is not None:
        elsewhere = "export it with `sdkd export`, and build on a machine with more memory"
        half = engines.plan.precision == "fp32" and engines.plan.target.exported_in is None
        return f"build with --precision fp16, or {elsewhere}" if half else elsewhere
    if options.precision == "fp32":
        return "export with --precision fp16"
    return "export with --no-verify" if options.verify else "export with fewer components"
