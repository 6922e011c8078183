"""Reading ahead: a pool of threads loads the rows that a run needs next, and replaces what cannot be read."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from sdkd.errors import InputError, TrainingError

T = TypeVar("T")
U = TypeVar("U")
LIMIT = 0.01  # share of the rows that may be unreadable
AHEAD = 32  # rows that are loaded before their use
_NAMED = 5  # unreadable images that the error message names
# What came for one position: the row (empty when there was none to be had) and what could not be read.
_Loaded = tuple[tuple[T, ...], dict[int, str]]


class Reader(Generic[T]):
    """Loads rows in order, ahead of their use, with `workers` threads (0: when asked for, in the caller's thread).

    `load(position, index)` may raise InputError for a row that cannot be read: the next readable index after it
    (modulo `count`) takes its place, whatever the threads do. `unreadable` names each such index once, with its
    message; `waited` is the time in seconds that the consumer had to wait. More than 1 % of them end the run.
    """

    def __init__(self, load: Callable[[int, int], T], count: int, *, workers: int = 4) -> None:
        if count < 1:
            raise InputError("the data holds no images: give at least one")
        if workers < 0:
            raise InputError(f"workers {workers} is too small: give 0 or more")
        self.load, self.count, self.workers = load, count, workers
        self.unreadable: dict[int, str] = {}
        self.waited = 0.0

    def rows(self, pairs: Iterable[tuple[int, int]]) -> Generator[tuple[int, T], None, None]:
        """Rows as (position, row) for (position, index) pairs, in their order; closing it stops the threads.

        Raises TrainingError when too many could not be read, and whatever else `load` raises.
        """
        with contextlib.closing(self._pooled(iter(pairs)) if self.workers else self._inline(pairs)) as promised:
            for position, get in promised:
                start = time.perf_counter()
                loaded = get()
                self.waited += time.perf_counter() - start
                yield position, self._accept(loaded)

    def _inline(self, pairs: Iterable[tuple[int, int]]) -> Generator[tuple[int, Callable[[], _Loaded[T]]]]:
        for position, index in pairs:
            yield position, partial(self._load, position, index)

    def _pooled(self, pairs: Iterator[tuple[int, int]]) -> Generator[tuple[int, Callable[[], _Loaded[T]]]]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sdkd-reader")
        waiting: deque[tuple[int, Future[_Loaded[T]]]] = deque()
        try:
            while True:
                for position, index in itertools.islice(pairs, AHEAD - len(waiting)):
                    waiting.append((position, pool.submit(self._load, position, index)))
                if not waiting:
                    return
                position, future = waiting.popleft()
                yield position, future.result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def one(self, index: int, read: Callable[[int], U]) -> U:
        """What `read` gives for an index, or for the next one that it can read, as for rows; TrainingError likewise."""
        return self._accept(self._first(index, read))

    def _load(self, position: int, index: int) -> _Loaded[T]:
        """Runs in the threads and changes nothing shared: what was met is counted in order, by the consumer."""
        return self._first(index, lambda place: self.load(position, place))

    def _first(self, index: int, read: Callable[[int], U]) -> _Loaded[U]:
        bad: dict[int, str] = {}
        for step in range(self.count):
            place = (index + step) % self.count
            try:
                return (read(place),), bad
            except InputError as error:
                bad[place] = str(error)
            if len(bad) > LIMIT * self.count:
                break
        return (), bad

    def _accept(self, loaded: _Loaded[U]) -> U:
        row, bad = loaded
        for index, message in bad.items():
            self.unreadable.setdefault(index, message)
        check_unreadable(self.unreadable, self.count)
        return row[0]


def check_unreadable(unreadable: Mapping[int, str], count: int) -> None:
    """TrainingError when more than 1 % of `count` images could not be read."""
    found = len(unreadable)
    if found <= LIMIT * count:
        return
    named = "; ".join(itertools.islice(unreadable.values(), _NAMED))
    more = f"; and {found - _NAMED} more" if found > _NAMED else ""
    raise TrainingError(
        f"{found} of {count} images ({found / count:.1%}) could not be read, more than {LIMIT:.0%} may not: repair or "
        f"remove them ({named}{more})"
    )
