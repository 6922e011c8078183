"""Run one function in a child process: crashes stay there, Ctrl-C ends it, progress and the result come back.

The child is `python -P -m sdkd.core.child`. It reads one JSON job (`function` as "module:name", `arguments`) as the
first line of its standard input and answers with JSON lines on the descriptor that was its standard output; whatever
a library prints goes to standard error, of which the parent keeps the last lines for the error message. End of file on
standard input means that the parent is gone, and ends the child.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import IO, Any

import sdkd.errors
from sdkd.core.children import environment
from sdkd.core.console import Progress, quiet
from sdkd.errors import BuildError, SdkdError

TAIL_LINES = 200
LINE_LENGTH = 2000
GRACE_SECONDS = 5.0


class ChildError(BuildError):
    """The child ended without a result: what it said, and the last lines that the library printed."""

    def __init__(self, message: str, tail: tuple[str, ...] = (), ended_by: str = "") -> None:
        super().__init__(message)
        self.tail = tail
        self.ended_by = ended_by  # a signal's name, empty for an exception


def run_in_child(function: str, arguments: Mapping[str, Any], progress: Progress = quiet) -> Any:
    """Call `module:name`(**arguments, progress=...) in a child process and return its JSON-ready result.

    An SdkdError or OSError of the child is raised here as itself; anything else, a crash included, as ChildError
    (a BuildError). KeyboardInterrupt here ends the child before it goes on.
    """
    with aside(function, arguments) as child:
        return child.result(progress)


def _result(answer: Mapping[str, Any] | None, status: int, tail: tuple[str, ...]) -> Any:
    if answer is None:
        raise _ended(status, tail)
    if "error" in answer:
        raise _error(answer["error"], tail)
    return answer["result"]


class Aside:
    """A function at work in a child process, while this one does something else."""

    def __init__(self, process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> None:
        self._process, self._job = process, job
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._said: queue.SimpleQueue[tuple[str, float | None] | None] = queue.SimpleQueue()
        self._answer: dict[str, Any] | None = None
        self._threads = [
            threading.Thread(target=_collect, args=(process.stderr, self._tail), daemon=True),
            threading.Thread(target=self._listen, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        try:
            self._answer = _converse(self._process, self._job, lambda *said: self._said.put(said), self._tail)
        finally:
            self._said.put(None)

    def result(self, progress: Progress = quiet) -> Any:
        """Wait for the result; raises as `run_in_child` says."""
        while (said := self._said.get()) is not None:
            progress(*said)
        self._process.wait()
        self.join()
        return _result(self._answer, self._process.returncode, tuple(self._tail))

    def join(self) -> None:
        """Wait for the threads that listen to a process which has ended."""
        for thread in self._threads:
            thread.join(GRACE_SECONDS)


@contextlib.contextmanager
def aside(function: str, arguments: Mapping[str, Any]) -> Iterator[Aside]:
    """Begin what `run_in_child` does, and go on; the child ends with the block."""
    with _child() as process:
        child = Aside(process, {"function": function, "arguments": dict(arguments)})
        try:
            yield child
        finally:
            _stop(process)
            child.join()


@contextlib.contextmanager
def _child() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-m", "sdkd.core.child"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment() | {"PYTHONUNBUFFERED": "1"}, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        _end(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    _stop(process)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream:
                stream.close()


def _collect(stream: IO[bytes], tail: deque[str]) -> None:
    with stream:
        for line in stream:
            if text := line.decode(errors="replace").rstrip():
                tail.append(text[:LINE_LENGTH])


def _converse(
    process: subprocess.Popen[bytes], job: Mapping[str, Any], progress: Progress, tail: deque[str]
) -> dict[str, Any] | None:
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):  # the child died at once: its exit status says why
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    for line in process.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            tail.append(line.decode(errors="replace").rstrip()[:LINE_LENGTH])
            continue
        if "progress" not in message:
            return dict(message)
        progress(*message["progress"])
    return None


def _error(error: Mapping[str, Any], tail: tuple[str, ...]) -> BaseException:
    if error.get("errno") is not None:
        return OSError(error["errno"], error["message"], error.get("filename"))
    kind = getattr(sdkd.errors, error["type"], None)
    if isinstance(kind, type) and issubclass(kind, SdkdError) and kind is not sdkd.errors.MissingExtraError:
        return kind(error["message"])
    failure = ChildError(f"{error['type']}: {error['message']}", tail)
    failure.add_note(error["traceback"])  # seen with --debug
    return failure


def _ended(status: int, tail: tuple[str, ...]) -> ChildError:
    if status < 0:
        name = signal.Signals(-status).name
        why = "the system most likely ran out of memory" if name == "SIGKILL" else "the library crashed"
        return ChildError(f"the process was ended by {name}: {why}", tail, ended_by=name)
    return ChildError(f"the process ended with status {status} and no result", tail, ended_by=f"status {status}")


def main() -> None:
    """The child: read a job, run it, answer, and leave without running the libraries' clean-up."""
    # The parent decides about Ctrl-C: a C++ builder cannot be interrupted by a Python signal handler anyway.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        job = json.loads(stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
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


def _leave_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _answer(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    module, _, name = job["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        return {"result": function(**job["arguments"], progress=progress)}
    except OSError as error:
        if error.errno is None or isinstance(error, SdkdError):
            return {"error": _describe(error)}
        detail = {"errno": error.errno, "filename": error.filename and str(error.filename)}
        return {"error": {**_describe(error), **detail, "message": error.strerror or str(error)}}
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the parent must hear of it
        return {"error": _describe(error)}


def _describe(error: Exception) -> dict[str, Any]:
    import traceback

    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error).strip() or repr(error), "traceback": text}


if __name__ == "__main__":
    main()
