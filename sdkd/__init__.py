"""Make Stable Diffusion 1.x, 2.x and SDXL small and fast: students, distillation, comparison and the `sdkd` command."""

import os
import sys


def _leave_working_folder() -> None:
    """`python -m sdkd.cli` looks for modules in the working folder first: a `signal.py` there is not to be run."""
    words, here = sys.orig_argv, os.getcwd()  # noqa: PTH109 - nothing is imported yet
    module = words[words.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in words else ""  # Python still looks
    ours = module.split(".")[0] in ("sdkd", "export", "engines")
    if ours and not sys.flags.safe_path and sys.path[:1] == [here] and not __file__.startswith(here + os.sep):
        del sys.path[0]


_leave_working_folder()

from sdkd.core.telemetry import switch_off  # noqa: E402 - from now on, imports find what is installed

__version__ = "0.1.0"

switch_off()
