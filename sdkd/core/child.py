"""Work in a child process: its environment, its errors here, how it ended, and that it ends with its parent.

`BackgroundJob` and `run_in_child` call one function in a fresh `python -P -m sdkd.core.child`. It reads one JSON job
(`function` as "module:name", `arguments`) as the first line of its standard input and answers with JSON lines on the
descriptor that was its standard output; what libraries print goes to standard error, of which the parent keeps the
last lines for the error message. Other kinds of child (`sdkd.compare`'s, torchrun's) share the pieces below.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import site
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import sdkd.errors
from sdkd.core.console import Progress, quiet
from sdkd.errors import BuildError, SdkdError

ROOT = str(Path(__file__).resolve().parents[2])
TAIL_LINES = 200
LINE_LENGTH = 2000
GRACE_SECONDS = 5.0


def environment() -> dict[str, str]:
    """What a child process and its own children get: our environment, the safe path, and our packages on it.

    Python looks for modules in the working folder first under `-c` and `-m`: a `signal.py` beside somebody's images
    would run. `sdkd/__init__.py` does the same for `python -m sdkd.cli`.
    """
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


@dataclass(frozen=True)
class Failure:
    """An exception of a child as plain data: its class of `sdkd.errors` (empty for any other), words, attributes."""

    kind: str
    name: str
    message: str
    traceback: str
    details: dict[str, str] = field(default_factory=dict)
    errno: int | None = None
    filename: str | None = None

    @staticmethod
    def of(error: Exception) -> Failure:
        """The data of an exception."""
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

    def error(self, unexpected: Callable[[str], Exception]) -> Exception:
        """The exception again: SdkdErrors and OSErrors as they were, any other as `unexpected("Class: message")`."""
        found: Exception
        if self.kind:
            kind: type[SdkdError] = getattr(sdkd.errors, self.kind)
            found = kind.__new__(kind, self.message)
            found.args = (self.message,)
            vars(found).update(self.details)
        elif self.errno is not None:
            found = OSError(self.errno, self.message, self.filename)
        else:
            found = unexpected(f"{self.name}: {self.message}")
        found.add_note(self.traceback)  # seen with --debug
        return found


def ended_by(status: int | None) -> str:
    """What ended a process, by its exit status: a signal's name, or `status N`."""
    if status is None or status >= 0:
        return f"status {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"


def end(gone: Callable[[float], bool], steps: Sequence[Callable[[], object]], patience: float = GRACE_SECONDS) -> None:
    """End a process by the first step that does; `gone` waits for so many seconds and says whether it has ended."""
    for step in steps:
        step()
        if gone(patience):
            return


def gone(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def live_as_child(wait_for_parent: Callable[[], object]) -> None:
    """What a child does first: it does not hear Ctrl-C, which ends its parent, ends with its parent, and prints to
    standard error, since standard output may be the parent's JSON.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    os.dup2(2, 1)

    def leave() -> None:
        wait_for_parent()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


class ChildError(BuildError):
    """The child ended without a result: what it said, and the last lines that the library printed."""

    def __init__(self, message: str, tail: tuple[str, ...] = (), ended_by: str = "") -> None:
        super().__init__(message)
        self.tail = tail
        self.ended_by = ended_by  # as the function `ended_by` says, empty for an exception


def run_in_child(function: str, arguments: Mapping[str, Any], progress: Progress = quiet) -> Any:
    """Call `module:name`(**arguments, progress=...) in a child process and return its JSON-ready result.

    An SdkdError or OSError of the child is raised here as itself; anything else, a crash included, as ChildError
    (a BuildError). KeyboardInterrupt here ends the child before it goes on.
    """
    with BackgroundJob(function, arguments) as job:
        return job.result(progress)


class BackgroundJob:
    """What `run_in_child` does, while this process does something else; the child ends with the `with` block."""

    def __init__(self, function: str, arguments: Mapping[str, Any]) -> None:
        job = json.dumps({"function": function, "arguments": dict(arguments)}).encode() + b"\n"
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._progress: queue.SimpleQueue[tuple[str, float | None] | None] = queue.SimpleQueue()
        self._answer: dict[str, Any] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sdkd.core.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
        )
        self._threads = [
            threading.Thread(target=self._collect, daemon=True),
            threading.Thread(target=self._converse, args=(job,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process.poll() is None:
            end(lambda seconds: gone(process, seconds), (process.terminate, process.kill))
        self._join()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()

    def result(self, progress: Progress = quiet) -> Any:
        """Wait for the result; raises as `run_in_child` says."""
        while (message := self._progress.get()) is not None:
            progress(*message)
        status = self._process.wait()
        self._join()
        tail, answer = tuple(self._tail), self._answer
        if answer is None:
            raise _ended(status, tail)
        if "error" in answer:
            raise Failure(**answer["error"]).error(lambda words: ChildError(words, tail))
        return answer["result"]

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(GRACE_SECONDS)

    def _collect(self) -> None:
        assert self._process.stderr
        with self._process.stderr as stream:
            for line in stream:
                self._keep(line)

    def _keep(self, line: bytes) -> None:
        if text := line.decode(errors="replace").rstrip():
            self._tail.append(text[:LINE_LENGTH])

    def _converse(self, job: bytes) -> None:
        """Send the job, pass on progress, and keep the answer; there is none where the child ended without one."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # the child died at once: its exit status says why
                self._process.stdin.write(job)
                self._process.stdin.flush()
            for line in self._process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    self._keep(line)
                    continue
                if "progress" not in message:
                    self._answer = message
                    return
                self._progress.put(tuple(message["progress"]))
        finally:
            self._progress.put(None)


def _ended(status: int, tail: tuple[str, ...]) -> ChildError:
    cause = ended_by(status)
    if status >= 0:
        return ChildError(f"the process ended with {cause} and no result", tail, cause)
    why = "the system most likely ran out of memory" if cause == "SIGKILL" else "the library crashed"
    return ChildError(f"the process was ended by {cause}: {why}", tail, cause)


def main() -> None:
    """The child: read a job, run it, answer, and leave without running the libraries' clean-up."""
    answers = os.dup(1)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        job = json.loads(stdin.readline())
    live_as_child(_wait_for_end_of_input)
    writing = threading.Lock()

    def send(message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with writing:
            while data:
                data = data[os.write(answers, data) :]

    answer = _answer(job, lambda message, fraction: send({"progress": [message, fraction]}))
    sys.stdout.flush()
    sys.stderr.flush()
    send(answer)
    os._exit(0)


def _wait_for_end_of_input() -> None:
    """The parent closes a child's standard input at the latest when it ends, however it ends."""
    while os.read(0, 1024):
        pass


def _answer(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    module, _, name = job["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        return {"result": function(**job["arguments"], progress=progress)}
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the parent must hear of it
        return {"error": asdict(Failure.of(error))}


if __name__ == "__main__":
    main()
