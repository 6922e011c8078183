"""Several data-parallel processes of the command that is running, started by torchrun, joined by Accelerate."""

from __future__ import annotations

import subprocess
import sys

from sdkd.core.child import end, environment, gone
from sdkd.core.interrupts import ended_by_term
from sdkd.errors import TrainingError

FLAG = "--num-processes"
PATIENCE = 40.0  # seconds: torchrun gives its processes 30


def relaunch(processes: int) -> None:
    """Run this command again in `processes` processes, and wait; TrainingError when one of them fails.

    Without GPUs the processes talk through gloo. Over several machines, start `torchrun ... -m sdkd.cli distill ...` or
    `accelerate launch ... --module sdkd.cli distill ...` on each, as their own documentation describes.
    """
    with subprocess.Popen(
        launch_command(processes, sys.argv[1:]), env={"OMP_NUM_THREADS": "1"} | environment()
    ) as launcher:
        try:
            status = launcher.wait()
        except KeyboardInterrupt:
            _end(launcher)
            raise
    if status in (130, -2):
        raise KeyboardInterrupt
    if status:
        raise TrainingError(f"one of {processes} processes ended with status {status}: its message is above")


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Wait for a launcher that ends its processes. Ctrl-C reached it, too, and SIGTERM this process alone."""
    first = launcher.terminate if ended_by_term() else launcher.poll
    end(lambda seconds: gone(launcher, seconds), (first, launcher.terminate, launcher.kill), PATIENCE)


def launch_command(processes: int, arguments: list[str]) -> list[str]:
    """The torchrun command line; the arguments without the number of processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, "-P", *launcher, "-m", "sdkd.cli", *without_flag(arguments)]


def without_flag(arguments: list[str]) -> list[str]:
    """Command-line arguments without `--num-processes N`."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if FLAG not in (before, word) and not word.startswith(f"{FLAG}=")]
