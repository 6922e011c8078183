"""The one place that knows the device of a report: its timer and its memory reader. A dry run has the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from gpu_bench.settings import Settings
from sdkd.compare.measure import Sample, Timer, warm_up

if TYPE_CHECKING:
    import torch

Work = Callable[[], object]


class Device:
    """Times calls and reads memory on the device that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.name = settings, settings.device
        self.timer = Timer(self.name)
        self.before = self.taken()

    def samples(self, work: Work) -> list[Sample]:
        """Timed calls after a warm-up until stable: the settings' number, or fewer once their seconds are spent."""
        import torch

        with torch.inference_mode():
            warm_up(work, self.timer)
            found: list[Sample] = []
            while len(found) < self.settings.runs and sum(one.wall_s for one in found) < self.settings.seconds:
                found.append(self.timer.time(work))
        return found

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

        from sdkd.distill.loop import peak_memory

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
        from sdkd.distill.encode import dtype_of

        return dtype_of(self.settings.precision)


def sampled(samples: list[Sample], **facts: Any) -> dict[str, Any]:
    """A row: the facts, the median, and all samples in seconds, of the device's clock and of the wall."""
    seconds = [one.seconds for one in samples]
    return {**facts, "median_s": median(seconds), "seconds": seconds, "wall_seconds": [one.wall_s for one in samples]}


def clocks() -> Mapping[str, str]:
    """Clocks, power and temperature of the first GPU as nvidia-smi says them; empty where there is none."""
    import subprocess

    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (word.strip() for word in asked.stdout.strip().split(",")), strict=False))
