"""Several data-parallel processes of the command that is running, started by torchrun, joined by Accelerate."""

from __future__ import annotations

import subprocess
import sys

from sdkd.children import environment
from sdkd.errors import TrainingError

FLAG = "--num-processes"


def relaunch(processes: int) -> None:
    """Run this command again in `processes` processes, and wait; TrainingError when one of them fails.

    Without GPUs the processes talk through gloo. Over several machines, start `torchrun ... -m sdkd.cli distill ...` or
    `accelerate launch ... --module sdkd.cli distill ...` on each, as their own documentation describes.
    """
    status = subprocess.run(launch_command(processes, sys.argv[1:]), env=_environment(), check=False).returncode
    if status in (130, -2):
        raise KeyboardInterrupt
    if status:
        raise TrainingError(f"one of {processes} processes ended with status {status}: its message is above")


def launch_command(processes: int, arguments: list[str]) -> list[str]:
    """The torchrun command line; the arguments without the number of processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, "-P", *launcher, "-m", "sdkd.cli", *without_flag(arguments)]


def without_flag(arguments: list[str]) -> list[str]:
    """Command-line arguments without `--num-processes N`."""
    kept, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word == FLAG:
            skip = True
        elif not word.startswith(f"{FLAG}="):
            kept.append(word)
    return kept


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1"} | environment()
