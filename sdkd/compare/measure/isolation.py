"""One subject in a process of its own: the same calls as a Worker's, over a pipe; a crash there is one message here.

On Linux children are forked from a server that has imported what every case needs (`LIBRARIES`), so that a
fresh process costs milliseconds; where torch sees a GPU, and elsewhere, each is started anew, because a GPU that any
library looked at before a fork cannot be used after it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sdkd.errors
from sdkd.compare.measure.peaks import Memory
from sdkd.compare.measure.timing import Sample
from sdkd.compare.measure.worker import LIBRARIES, Drawn, Job, Opened, Worker
from sdkd.core.child import inherited
from sdkd.errors import EngineError, SdkdError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, SpawnContext

    from sdkd.compare.measure.calls import Request

GRACE_SECONDS = 5.0
PRELOAD = [*LIBRARIES, "sdkd.compare.measure.worker"]
DOING = {
    "open": "it was loaded",
    "images": "it made images",
    "attention": "its attention kernel was looked up",
    "warm": "it was warmed up",
    "burst": "it was timed",
}
LESS_MEMORY = "compare fewer subjects at once, or give a smaller --size or --batch"


@dataclass(frozen=True)
class Failure:
    """An exception of a child: its class of `sdkd.errors` (empty for any other), words, and what it carries."""

    kind: str
    name: str
    message: str
    traceback: str
    details: dict[str, str] = field(default_factory=dict)
    errno: int | None = None
    filename: str | None = None


class Child:
    """A Seat in a process of its own, which ends with `close`, and when this process is gone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._busy = False
        context = _context()
        self._pipe, theirs = context.Pipe()
        try:
            self._process = context.Process(target=serve, args=(theirs, job), name=f"sdkd compare: {job.subject.label}")
            _start(self._process)
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()  # else the end of the child would not be the end of the pipe

    def open(self) -> Opened:
        """As a Seat."""
        return self._ask("open")

    def images(self, request: Request, prompt: int) -> Drawn:
        """As a Seat."""
        return self._ask("images", request, prompt)

    def attention(self, request: Request) -> str:
        """As a Seat."""
        return self._ask("attention", request)

    def warm(self, part: str, request: Request) -> float:
        """As a Seat."""
        return self._ask("warm", part, request)

    def burst(self, part: str, request: Request, count: int) -> list[Sample]:
        """As a Seat."""
        return self._ask("burst", part, request, count)

    def memory(self) -> Memory:
        """As a Seat."""
        return self._ask("memory")

    def _ask(self, name: str, *words: Any) -> Any:
        """The answer of the child; its error as the same error, its death as EngineError."""
        self._busy = True
        try:
            self._pipe.send((name, words))
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._ended(name) from error
        self._busy = False
        if isinstance(answer, Failure):
            raise _error(answer, self.job.subject.label, name)
        return answer

    def _ended(self, name: str) -> EngineError:
        self._process.join(GRACE_SECONDS)
        how, advice = _how_it_ended(self._process.exitcode)
        doing = DOING.get(name, "it was asked for its memory")
        return EngineError(f"the process of {self.job.subject.label!r} was ended {how} while {doing}: {advice}")

    def close(self) -> None:
        """End the process: by asking when it waits, by a signal when it is in the middle of something."""
        if not self._busy:
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._process.join(GRACE_SECONDS)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(GRACE_SECONDS)
        self._pipe.close()
        with contextlib.suppress(ValueError):  # still running: not even SIGKILL ends a process that waits for a disk
            self._process.close()


def _how_it_ended(status: int | None) -> tuple[str, str]:
    """In words how a process ended, and what to do about it."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        if name == "SIGKILL":
            return f"by {name}", f"most likely the system ran out of memory; {LESS_MEMORY}"
        return f"by {name}", "a library of its target crashed; build its engines again, or try another version"
    return f"with status {status}", "look at what it printed above"


def _error(failure: Failure, label: str, name: str) -> Exception:
    """The exception of a child, raised again here: SdkdErrors and OSErrors as they were, others as EngineError."""
    found: Exception
    if failure.kind:
        kind: type[SdkdError] = getattr(sdkd.errors, failure.kind)
        found = kind.__new__(kind, failure.message)
        found.args = (failure.message,)
        vars(found).update(failure.details)
    elif failure.errno is not None:
        found = OSError(failure.errno, failure.message, failure.filename)
    else:
        words = f"{label!r} failed while {DOING.get(name, name)}: {failure.name}: {failure.message}"
        found = EngineError(f"{words}; --debug shows where")
    found.add_note(failure.traceback)  # seen with --debug
    return found


def _describe(error: Exception) -> Failure:
    import traceback

    text = "".join(traceback.format_exception(error))
    words, name = str(error).strip() or repr(error), type(error).__name__
    if isinstance(error, SdkdError):
        known = (kind.__name__ for kind in type(error).__mro__ if getattr(sdkd.errors, kind.__name__, None) is kind)
        details = {key: value for key, value in vars(error).items() if isinstance(value, str)}
        return Failure(next(known), name, words, text, details)
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else str(error.filename)
        return Failure("", name, error.strerror or words, text, errno=error.errno, filename=filename)
    return Failure("", name, words, text)


def _context() -> ForkServerContext | SpawnContext:
    """How children are started here."""
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def prepare_children() -> None:
    """Start the server that children are forked from, in the background; does nothing where there is none."""
    if _context().get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        with _no_interrupts(), inherited():
            ensure_running()


def _start(process: Any) -> None:
    """Start a child that never hears Ctrl-C, which ends this process, and so the child."""
    prepare_children()
    if _context().get_start_method() == "forkserver":
        with inherited():
            process.start()  # waits for the server, which may still import: must hear Ctrl-C
        return
    with _no_interrupts(), inherited():
        process.start()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that are started within ignore SIGINT; only the main thread can arrange for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(connection: Connection, job: Job) -> None:
    """The child: answer what is asked until the parent says None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    os.dup2(2, 1)  # what libraries print must not stand in the parent's JSON
    _use_no_semaphores()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    worker = Worker(job)
    while (asked := _next(connection)) is not None:
        name, words = asked
        try:
            answer = getattr(worker, name)(*words)
        except Exception as error:  # noqa: BLE001 - whatever a library raises, the parent must hear of it
            answer = _describe(error)
        connection.send(answer)
    worker.close()


def _use_no_semaphores() -> None:
    """Have tqdm lock among threads only: a killed child would leave its lock among processes behind."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def _next(connection: Connection) -> tuple[str, tuple[Any, ...]] | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
