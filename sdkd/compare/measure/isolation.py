"""Subjects in processes of their own: the calls of a LocalRunner over a pipe; a crash there is one message here.

On Linux children are forked from a server that has imported what every subject needs (`LIBRARIES`), so that a fresh
process costs milliseconds; where torch sees a GPU, and elsewhere, each is spawned, because a GPU that any library
looked at before a fork cannot be used after it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.runner import LIBRARIES, Drawn, LocalRunner, Opened, RunConfig
from sdkd.compare.measure.subjects import Subject
from sdkd.compare.measure.timing import Sample
from sdkd.core.child import GRACE_SECONDS, Failure, end, ended_by, inherited, live_as_child
from sdkd.core.interrupts import handling
from sdkd.errors import EngineError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, SpawnContext

    from sdkd.compare.measure.calls import Request

PRELOAD = [*LIBRARIES, "sdkd.compare.measure.runner"]
DOING = {
    "open": "it was loaded",
    "images": "it made images",
    "attention": "its attention kernel was looked up",
    "warm": "it was warmed up",
    "burst": "it was timed",
    "memory": "it was asked for its memory",
}
LESS_MEMORY = "compare fewer subjects at once, or give a smaller --size or --batch"


class IsolatedRunner:
    """A SubjectRunner in a process of its own, which ends with `close`, and when this process is gone."""

    def __init__(self, subject: Subject, config: RunConfig) -> None:
        self.subject = subject
        self._busy = False
        context = _context()
        self._connection, theirs = context.Pipe()
        try:
            name = f"sdkd compare: {subject.label}"
            self._process = context.Process(target=serve, args=(theirs, subject, config), name=name)
            _start(self._process)
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()  # else the end of the child would not be the end of the pipe

    def open(self) -> Opened:
        """As a SubjectRunner."""
        return self._ask("open")

    def images(self, request: Request, prompt: int) -> Drawn:
        """As a SubjectRunner."""
        return self._ask("images", request, prompt)

    def attention(self, request: Request) -> str:
        """As a SubjectRunner."""
        return self._ask("attention", request)

    def warm(self, part: str, request: Request) -> float:
        """As a SubjectRunner."""
        return self._ask("warm", part, request)

    def burst(self, part: str, request: Request, count: int) -> list[Sample]:
        """As a SubjectRunner."""
        return self._ask("burst", part, request, count)

    def memory(self) -> Memory:
        """As a SubjectRunner."""
        return self._ask("memory")

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The answer of the child; its error as the same error, its end as EngineError."""
        label, doing = self.subject.label, DOING[name]
        self._busy = True
        try:
            self._connection.send((name, arguments))
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(GRACE_SECONDS)
            how = _how_it_ended(self._process.exitcode, doing)
            raise EngineError(f"the process of {label!r} was ended {how}") from error
        self._busy = False
        if isinstance(answer, Failure):
            raise answer.error(
                lambda words: EngineError(f"{label!r} failed while {doing}: {words}; --debug shows where")
            )
        return answer

    def close(self) -> None:
        """End the process: by asking when it waits, by a signal when it is in the middle of something."""
        steps = [self._process.terminate, self._process.kill]
        if not self._busy:
            steps.insert(0, self._ask_to_end)
        if not self._gone(0):
            end(self._gone, steps)
        self._connection.close()
        with contextlib.suppress(ValueError):  # still running: not even SIGKILL ends a process that waits for a disk
            self._process.close()

    def _ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)

    def _gone(self, seconds: float) -> bool:
        self._process.join(seconds)
        return not self._process.is_alive()


def _how_it_ended(status: int | None, doing: str) -> str:
    """In words how a process ended while it was doing something, and what to do about it."""
    cause = ended_by(status)
    if status is None or status >= 0:
        return f"with {cause} while {doing}: look at what it printed above"
    if cause == "SIGKILL":
        return f"by {cause} while {doing}: most likely the system ran out of memory; {LESS_MEMORY}"
    return f"by {cause} while {doing}: a library of its target crashed; build its engines again, or try another version"


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
    forked = _context().get_start_method() == "forkserver"  # from a server that may still import: must hear Ctrl-C
    with contextlib.nullcontext() if forked else _no_interrupts(), inherited():
        process.start()


def _no_interrupts() -> contextlib.AbstractContextManager[None]:
    """Processes that are started within ignore SIGINT; only the main thread can arrange for that."""
    return handling(signal.SIG_IGN, signal.SIGINT)


def serve(connection: Connection, subject: Subject, config: RunConfig) -> None:
    """The child: answer calls of a LocalRunner's methods until the parent sends None or is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    live_as_child(parent.join)
    _use_no_semaphores()
    runner = LocalRunner(subject, config)
    with contextlib.suppress(EOFError):
        while (asked := connection.recv()) is not None:
            name, arguments = asked
            try:
                answer = getattr(runner, name)(*arguments)
            except Exception as error:  # noqa: BLE001 - whatever a library raises, the parent must hear of it
                answer = Failure.of(error)
            connection.send(answer)
    runner.close()


def _use_no_semaphores() -> None:
    """Have tqdm lock among threads only: a killed child would leave its lock among processes behind."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
