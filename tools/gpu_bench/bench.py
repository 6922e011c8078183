"""What every piece of a report works with: settings, record, and the device with its timer and memory reader.

A dry run has the CPU's.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from bench_kit.record import Record

from gpu_bench.settings import KINDS, TENSORRT, Settings
from sdkd.compare.measure.timing import Sample, Timer, warm_up
from sdkd.errors import EngineError

if TYPE_CHECKING:
    import torch

Work = Callable[[], object]
QUEUED = 10  # calls in a row that nothing waits between
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate")


class Bench:
    """Times calls and reads memory on the device that the settings name, and records rows of a piece."""

    def __init__(self, settings: Settings, record: Record, kind: str, model: str) -> None:
        self.settings, self.record, self.kind, self.model = settings, record, kind, model
        self.device = settings.device
        self.timer = Timer(self.device)
        self.clocks: Mapping[str, str] = {}  # under the load of the last timed calls
        self.before = self.taken()
        self.load_s = 0.0  # of the engine that was opened last

    @property
    def name(self) -> str:
        """What sdkd calls the piece's model."""
        return self.settings.models[self.model]

    @property
    def dtype(self) -> torch.dtype:
        """Torch's dtype of the settings' precision."""
        from sdkd.core.contract import torch_dtype

        return torch_dtype(self.settings.precision)

    def row(self, call: Work, what: str, way: str, batch: int, size: int, queued: int = 1, **facts: Any) -> None:
        """Time a call and add its row: the median, all samples in seconds, of the device's clock and of the wall.

        `queued`: calls that nothing waits between; the samples are of one of them, and memory is not said.
        """
        self.wait()  # what torch keeps in store of a larger shape is not taken by this one
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        samples = self.samples(call if queued == 1 else lambda: [call() for _ in range(queued)])
        seconds = [one.seconds / queued for one in samples]
        memory = self.memory() if queued == 1 else {}
        self.record.row(
            what=what, way=way, batch=batch, size=size, precision=self.settings.precision, median_s=median(seconds),
            seconds=seconds, wall_seconds=[one.wall_s / queued for one in samples], **facts, **memory,
        )  # fmt: skip

    def samples(self, work: Work) -> list[Sample]:
        """Timed calls after a warm-up until stable: the settings' number, or fewer once their seconds are spent."""
        import torch

        with torch.inference_mode():
            warm_up(work, self.timer)
            found: list[Sample] = []
            while len(found) < self.settings.runs and sum(one.wall_s for one in found) < self.settings.seconds:
                found.append(self.timer.time(work))
            if self.device == "cuda":
                self.clocks = self._clocks_under(work) or self.clocks
        return found

    def seconds(self, work: Work) -> float:
        """Wall clock of one call, the device's work included."""
        return self.timer.time(work).wall_s

    def _clocks_under(self, work: Work) -> Mapping[str, str]:
        """Clocks while the work runs: nvidia-smi takes longer than most calls, and an idle GPU slows down."""
        asked = _ask()
        while asked is not None and asked.poll() is None:
            self.timer.time(work)
        return _answer(asked)

    def begin(self) -> None:
        """Memory that is taken counts from here: before a new subject, once the last one is gone."""
        gc.collect()
        self.wait()
        self.before = self.taken()

    def wait(self) -> None:
        """Wait for everything that is queued, and give back what torch keeps in store."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, int]:
        """Bytes: the most that torch allocated since its peak was reset, and what is taken now beyond the beginning."""
        import torch

        from sdkd.distill.training.loop import peak_memory

        return {"peak_bytes": peak_memory(torch.device(self.device)), "taken_bytes": max(0, self.taken() - self.before)}

    def taken(self) -> int:
        """Bytes in use: of the whole GPU, whoever took them, or of this process."""
        if self.device == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        from sdkd.compare.measure.environment import rss

        return rss()

    def check_place(self, sessions: Iterable[Any]) -> None:
        """EngineError unless all of these sessions run on the report's device: a library may fall back silently."""
        for session in sessions:
            if session.device.type != self.device:
                raise EngineError(
                    f"{session.checked.label} runs on {session.device.type}, and the report is of {self.device}: "
                    f"see what `sdkd doctor` says of {session.slot}"
                )


def clocks() -> Mapping[str, str]:
    """Clocks, power and temperature of the first GPU as nvidia-smi says them; empty where there is none."""
    return _answer(_ask())


def _ask() -> subprocess.Popen[str] | None:
    """A question to nvidia-smi, which gives up by itself; None where there is none."""
    command: Sequence[str] = ("timeout", "5", "nvidia-smi", f"--query-gpu={','.join(CLOCKS)}",
                              "--format=csv,noheader", "--id=0")  # fmt: skip
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _answer(asked: subprocess.Popen[str] | None) -> Mapping[str, str]:
    said = asked.communicate()[0] if asked is not None else ""
    return dict(zip(CLOCKS, (word.strip() for word in said.strip().split(",")), strict=False)) if "," in said else {}


def run(record: Record, kind: str, model: str, settings: Mapping[str, Any]) -> None:
    """A piece, in this process."""
    module, _, name = KINDS[kind].function.partition(":")
    record.fact(clocks_before=clocks())
    bench = Bench(Settings.from_json(settings), record, kind, model)
    with record.part("piece"):
        getattr(importlib.import_module(f"gpu_bench.{module}"), name)(bench)
    record.fact(clocks_under_load=bench.clocks, clocks_after=clocks())


def doctor(bench: Bench) -> None:
    """First of all whether each TensorRT kind builds, opens and runs a small engine here; then all of doctor."""
    from sdkd.commands.doctor import examine, try_target

    trials = []
    for target in TENSORRT:
        if target in bench.settings.targets:
            with bench.record.part(target):
                trials += [dataclasses.asdict(trial) for trial in try_target(target)]
                bench.record.fact(trials=trials)
    with bench.record.part("doctor"):
        bench.record.fact(doctor=examine())


def ceilings(bench: Bench) -> None:
    """The largest rate of a matrix product in each precision, and of a copy."""
    from sdkd.compare.measure.limits import measure_ceilings

    for precision in dict.fromkeys((bench.settings.precision, bench.settings.train_precision)):
        with bench.record.part(precision):
            found = measure_ceilings(bench.device, precision)
            bench.record.row(what="ceilings", precision=precision, **dataclasses.asdict(found))
