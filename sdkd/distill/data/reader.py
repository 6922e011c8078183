"""Reading ahead: a pool of threads loads the rows that a run needs next, and replaces what cannot be read."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from sdkd.errors import InputError, TrainingError

T = TypeVar("T")
U = TypeVar("U")
LIMIT = 0.01  # share of the rows that may be unreadable
_NAMED = 5  # unreadable images that the error message names


class _Loaded(NamedTuple, Generic[T]):
    """What came for one position: the row (empty when there was none to be had) and what could not be read."""

    row: tuple[T, ...]
    bad: dict[int, str]


class Reader(Generic[T]):
    """Loads rows in order, `ahead` of their use, with `workers` threads (0: when asked for, in the caller's thread).

    `load(position, index)` may raise InputError for a row that cannot be read: the next readable index after it
    (modulo `count`) takes its place, whatever the threads do. `unreadable` names each such index once, with its
    message; `waited` is the time in seconds that the consumer had to wait. More than `limit` * `count` of them end the
    run.
    """

    def __init__(
        self, load: Callable[[int, int], T], count: int, *, workers: int = 4, ahead: int = 32, limit: float = LIMIT
    ) -> None:
        if count < 1:
            raise InputError("the data holds no images: give at least one")
        if workers < 0 or ahead < 1 or not 0 <= limit <= 1:
            raise InputError(
                f"workers {workers}, ahead {ahead}, limit {limit} are not usable: give workers of 0 or more, "
                "ahead of 1 or more and a limit from 0 to 1"
            )
        self.load, self.count, self.workers, self.ahead, self.limit = load, count, workers, ahead, limit
        self.unreadable: dict[int, str] = {}
        self.waited = 0.0

    def rows(self, pairs: Iterable[tuple[int, int]]) -> Generator[tuple[int, T], None, None]:
        """Rows as (position, row) for (position, index) pairs, in their order; closing it stops the threads.

        Raises TrainingError when too many could not be read, and whatever else `load` raises.
        """
        return self._pooled(iter(pairs)) if self.workers else self._inline(pairs)

    def _inline(self, pairs: Iterable[tuple[int, int]]) -> Generator[tuple[int, T], None, None]:
        for position, index in pairs:
            start = time.perf_counter()
            loaded = self._load(position, index)
            self.waited += time.perf_counter() - start
            yield position, self._accept(loaded)

    def _pooled(self, pairs: Iterator[tuple[int, int]]) -> Generator[tuple[int, T], None, None]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sdkd-reader")
        waiting: deque[tuple[int, Future[_Loaded[T]]]] = deque()
        try:
            while True:
                for position, index in itertools.islice(pairs, self.ahead - len(waiting)):
                    waiting.append((position, pool.submit(self._load, position, index)))
                if not waiting:
                    return
                position, future = waiting.popleft()
                yield position, self._accept(self._wait(future))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, future: Future[_Loaded[T]]) -> _Loaded[T]:
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - start

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
                return _Loaded((read(place),), bad)
            except InputError as error:
                bad[place] = str(error)
            if len(bad) > self.limit * self.count:
                break
        return _Loaded((), bad)

    def _accept(self, loaded: _Loaded[U]) -> U:
        for index, message in loaded.bad.items():
            self.unreadable.setdefault(index, message)
        check_unreadable(self.unreadable, self.count, self.limit, nothing=not loaded.row)
        return loaded.row[0]


def check_unreadable(unreadable: dict[int, str], count: int, limit: float = LIMIT, *, nothing: bool = False) -> None:
    """TrainingError when more than `limit` of `count` images could not be read, or `nothing` could be."""
    found = len(unreadable)
    if found <= limit * count and not nothing:
        return
    named = "; ".join(itertools.islice(unreadable.values(), _NAMED))
    more = f"; and {found - _NAMED} more" if found > _NAMED else ""
    raise TrainingError(
        f"{found} of {count} images ({found / count:.1%}) could not be read, more than {limit:.0%} may not: repair or "
        f"remove them ({named}{more})"
    )
