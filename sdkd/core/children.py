"""The environment of Python processes that we start, or libraries for us: no module of the working folder runs there.

Python looks for modules in the working folder first under `-c` and `-m`: a `signal.py` beside somebody's images would
run. `sdkd/__init__.py` does the same for `python -m sdkd.cli`.
"""

from __future__ import annotations

import contextlib
import os
import site
from collections.abc import Iterator
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def environment() -> dict[str, str]:
    """What a child process and its own children get: our environment, the safe path, and our packages on it."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]  # "" is the working folder
    if ROOT not in (*paths, *site.getsitepackages(), site.getusersitepackages()):
        paths.insert(0, ROOT)
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


@contextlib.contextmanager
def inherited() -> Iterator[None]:
    """Processes that libraries start within get `environment()`."""
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})
