"""The one place that knows the device of a report: its timer and its memory reader. A dry run has the CPU's."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from gpu_bench.settings import Settings
from sdkd.compare.measure.timing import Sample, Timer, warm_up

if TYPE_CHECKING:
    import torch

Work = Callable[[], object]
QUEUED = 10  # calls in a row that nothing waits between
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate")


class Device:
    """Times calls and reads memory on the device that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.name = settings, settings.device
        self.timer = Timer(self.name)
        self.clocks: Mapping[str, str] = {}  # under the load of the last timed calls
        self.before = self.taken()

    def begin(self) -> None:
        """Memory that is taken counts from here: before a new subject, once the last one is gone."""
        gc.collect()
        self.wait()
        self.before = self.taken()

    def samples(self, work: Work) -> list[Sample]:
        """Timed calls after a warm-up until stable: the settings' number, or fewer once their seconds are spent."""
        import torch

        with torch.inference_mode():
            warm_up(work, self.timer)
            found: list[Sample] = []
            while len(found) < self.settings.runs and sum(one.wall_s for one in found) < self.settings.seconds:
                found.append(self.timer.time(work))
            if self.name == "cuda":
                self.clocks = self._clocks_under(work) or self.clocks
        return found

    def queued(self, work: Work) -> list[Sample]:
        """Samples of one call, when QUEUED of them are made and nothing waits in between."""

        def several() -> None:
            for _ in range(QUEUED):
                work()

        return [
            replace(
                one, wall_s=one.wall_s / QUEUED, cpu_s=one.cpu_s / QUEUED,
                device_s=None if one.device_s is None else one.device_s / QUEUED,
            )
            for one in self.samples(several)
        ]  # fmt: skip

    def _clocks_under(self, work: Work) -> Mapping[str, str]:
        """Clocks while the work runs: nvidia-smi takes longer than most calls, and an idle GPU slows down."""
        asked = _ask()
        while asked is not None and asked.poll() is None:
            self.timer.time(work)
        return _answer(asked)

    def seconds(self, work: Work) -> float:
        """Wall clock of one call, the device's work included."""
        return self.timer.time(work).wall_s

    def reset_peak(self) -> None:
        """Let the peak begin anew, where the device counts one."""
        if self.name == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int]:
        """Bytes: the most that torch allocated since `reset_peak`, and what is taken now beyond the process's start."""
        import torch

        from sdkd.distill.training.loop import peak_memory

        return {"peak_bytes": peak_memory(torch.device(self.name)), "taken_bytes": max(0, self.taken() - self.before)}

    def taken(self) -> int:
        """Bytes in use: of the whole GPU, whoever took them, or of this process."""
        if self.name == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        import psutil

        return int(psutil.Process().memory_info().rss)

    def wait(self) -> None:
        """Wait for everything that is queued, and give back what torch keeps in store."""
        if self.name == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @property
    def dtype(self) -> torch.dtype:
        """Torch's dtype of the settings' precision."""
        from sdkd.core.contract import torch_dtype

        return torch_dtype(self.settings.precision)


def sampled(samples: list[Sample], **facts: Any) -> dict[str, Any]:
    """A row: the facts, the median, and all samples in seconds, of the device's clock and of the wall."""
    seconds = [one.seconds for one in samples]
    return {**facts, "median_s": median(seconds), "seconds": seconds, "wall_seconds": [one.wall_s for one in samples]}


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
