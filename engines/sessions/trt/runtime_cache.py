"""What TensorRT-RTX compiled for this GPU, kept by the plan's SHA-256 among the user's caches.

Never in the bundle: it is native code, too, and no manifest vouches for it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

from sdkd.core.files import write_bytes
from sdkd.targets.registry import cache_folder
from sdkd.targets.tensorrt_api import IRuntimeCache, IRuntimeConfig

log = logging.getLogger(__name__)


class RuntimeCache:
    """One engine's compiled kernels, shared by all its execution contexts, and the file that they are kept in.

    Does nothing for libraries that compile nothing at run time.
    """

    def __init__(self, sha256: str) -> None:
        self.path = cache_folder() / "runtime" / f"{sha256}.cache"
        self._cache: IRuntimeCache | None = None
        self._kept = 0  # bytes of what the file holds
        self._saved: set[Hashable] = set()

    def attach(self, runtime_config: IRuntimeConfig) -> bool:
        """Give a runtime configuration the cache, read from its file at first; False when it was not taken."""
        if not hasattr(runtime_config, "create_runtime_cache"):
            return True
        if self._cache is None:
            self._cache = self._read(runtime_config.create_runtime_cache())
        return runtime_config.set_runtime_cache(self._cache)

    def _read(self, cache: IRuntimeCache) -> IRuntimeCache:
        if self.path.is_file():
            blob = self.path.read_bytes()
            if cache.deserialize(blob):
                self._kept = len(blob)
            else:
                log.info("%s is for another GPU, driver or version: kernels are compiled again", self.path)
        return cache

    def save_for(self, shape: Hashable) -> None:
        """Save after a run of a shape, when it is the first: that one compiles, and asking what there is takes time."""
        if self._cache is not None and shape not in self._saved:
            self._saved.add(shape)
            self.save()

    def save(self) -> None:
        """Write the cache when it grew; a read-only home only costs the next start some seconds."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if len(blob) <= self._kept:
            return
        try:
            write_bytes(self.path, blob)
        except OSError as error:
            log.info("the runtime cache could not be kept at %s: %s", self.path, error)
        self._kept = len(blob)
