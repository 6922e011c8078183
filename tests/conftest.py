"""What every test sees: `helpers` on the path, no network, no GPU unless a test asks for one."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

import sdkd.compare.measure.limits as limits

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
# The code around inductor's kernels is compiled in half the time, and runs as it did: users keep PyTorch's level.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
sys.path.insert(0, str(Path(__file__).parent))
gc.disable()  # until everything is imported: `pytest_collection_finish`
os.fsync = lambda _: None  # nothing here outlives a power failure, and the disk takes a tenth of a training run
limits.BUDGET_S, limits.COPY_BYTES = 0.01, 2**20  # every comparison measures them; only tools need good figures
limits.CONVOLUTION = (2, 4, 8)
# Started by nohup, or by `&` in a script: tests, and their children, hear Ctrl-C all the same.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Make the folder for shared work, and the user's caches in it, before any process of the run starts."""
    from made_once import shared_root

    os.environ["XDG_CACHE_HOME"] = str(shared_root() / "caches")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that begin with `test_gpu_` as `gpu`; skip them where torch sees no CUDA device."""
    marked = [item for item in items if item.name.startswith("test_gpu_")]
    for item in marked:
        item.add_marker("gpu")
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Keep the collector from walking over all imported libraries again and again, which takes long."""
    gc.collect()
    gc.freeze()
    gc.enable()
