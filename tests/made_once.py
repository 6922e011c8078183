"""What is made once per test run, for all of its processes: exported bundles take half a minute each."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

SHARED = "SDKD_TEST_SHARED"


def shared_root() -> Path:
    """The run's folder for shared work; the process that asks first owns it, its children inherit it."""
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="sdkd-test-shared-")
        atexit.register(shutil.rmtree, os.environ[SHARED], ignore_errors=True)
    return Path(os.environ[SHARED])


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` wrote (it gets a path that is free) in this run: read it, do not change it."""
    folder = shared_root() / name
    with FileLock(folder.with_name(f"{name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=shared_root()) as partial:
                make(Path(partial) / name)
                gc.collect()
                gc.freeze()  # exporters' libraries, loaded here: see conftest.py
                (Path(partial) / name).rename(folder)
    return folder
