"""One subject where it is measured: opened, its images made, its parts timed, here or in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from engines.generate.long_prompts import cut_lines
from sdkd.compare.measure.calls import (
    UNET,
    WORKS,
    Request,
    Size,
    image_size,
    inputs_note,
    kind_of,
    make_images,
    step_work,
)
from sdkd.compare.measure.environment import Memory, attention_kernel, gpu_used, peak_rss, rss, torch_peak
from sdkd.compare.measure.peers import Shape
from sdkd.compare.measure.subjects import Subject, close_subject, compiling, count_parameters, open_subject
from sdkd.compare.measure.timing import Bench, Sample, Timer
from sdkd.core import processes
from sdkd.core.child import GRACE_SECONDS, Failure, end, ended_by
from sdkd.core.components import unet_copies
from sdkd.core.conditions import guidance_width
from sdkd.core.contract import torch_dtype
from sdkd.core.processes import LIBRARIES
from sdkd.errors import EngineError
from sdkd.targets.registry import require

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from PIL.Image import Image

PRELOAD = [*LIBRARIES, "sdkd.compare.measure.runner"]
DOING = {
    "open": "it was loaded",
    "images": "it made images",
    "attention": "its attention kernel was looked up",
    "burst": "it was timed",
    "memory": "it was asked for its memory",
}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@dataclass(frozen=True)
class RunConfig:
    """How subjects are measured; goes to other processes as it is."""

    device: str
    keep_loaded: bool = True  # all subjects at once; otherwise one at a time, loaded again when it is its turn
    isolate: bool = False  # each in a process of its own, whose peak of memory is then the subject's
    size: Size | None = None  # None: the model's own
    prompts: tuple[str, ...] = ()
    batch: int = 1  # images per call
    untimed: bool = False  # images alone count: half precision is computed in float32 where the CPU has no units for it
    threads: int = field(default_factory=_threads)  # PyTorch's, as in the process that asks


@dataclass(frozen=True)
class Opened:
    """What is known of a subject once it is open."""

    load_s: float
    device: str
    size: Size
    scheduler: str
    unet_parameters: int
    parameters: int
    copies: int = 2  # latents per image in a guided UNet call
    notes: tuple[str, ...] = ()  # what it draws from beside prompts, and what of prompts it does not read


@dataclass(frozen=True)
class Drawn:
    """The images of one call, how long it took, and how often it called the UNet."""

    images: list[Image]
    sample: Sample
    unet_calls: int


class LocalRunner:
    """Loads, runs and times one subject in this process."""

    def __init__(self, subject: Subject, config: RunConfig) -> None:
        self.subject, self.config = subject, config
        self._pipe: Any = None
        self._bench = Bench({}, Timer())
        self._request: Request | None = None
        self._memory = Memory()

    def open(self) -> Opened:
        """Load the subject, timed; InputError when it cannot make images of the asked size."""
        import torch

        for name in LIBRARIES:  # else the first subject's loading time would contain their import
            importlib.import_module(name)
        if self.config.threads != torch.get_num_threads():
            torch.set_num_threads(self.config.threads)
        subject = self.subject
        self._memory = Memory(base_rss=rss())
        if subject.has_engines:
            require(subject.target)  # the library's own import is not the engine's load
        load_s = Timer().time(self._load).wall_s
        device = str(self._pipe.device)
        self._bench = Bench({}, Timer(device))
        size = image_size(self._pipe, self.config.size)
        scheduler = type(self._pipe.scheduler).__name__
        counts, config = count_parameters(subject, self._pipe), self._pipe.unet.config
        copies = unet_copies(config.in_channels, config.out_channels, guidance_width(config) is not None)
        given = inputs_note(subject.model_label, kind_of(self._pipe))
        own = subject.peer.notes if subject.peer else ()
        notes = (*([given] if given else []), *own, *_caching(subject), *cut_lines(self._pipe, self.config.prompts))
        return Opened(load_s, device, size, scheduler, *counts, copies, notes)

    def _load(self) -> None:
        self._pipe = open_subject(self.subject, self.config.device, self._shape())

    def _shape(self) -> Shape | None:
        """What will be asked of it, as far as it is known: the first subject's own size is asked of the others."""
        run, size = self.subject.run, self.config.size
        return None if run is None or size is None else Shape(self.config.batch, *size, run.guidance_scale > 1)

    def images(self, request: Request, prompt: int) -> Drawn:
        """Make the images of one prompt in one call, timed end to end; EngineError for what torch.compile raises."""
        made: list[Image] = []
        with compiling(self.subject), self._quick():
            sample = self._bench.timer.time(lambda: made.extend(make_images(self._pipe, request, prompt)))
        if not self._memory.growth:
            self._memory = replace(self._memory, growth=rss() - self._memory.base_rss)
        self._note_gpu_memory()
        return Drawn(made, sample, len(self._pipe.scheduler.timesteps))

    def _quick(self) -> contextlib.AbstractContextManager[None]:
        """Products in float32, rounded as units would, where nothing is timed: scalar loops take 200 times as long."""
        if not (self.config.untimed and self.subject.is_eager):
            return contextlib.nullcontext()
        from export.check.half_products import quick_half

        return quick_half(torch_dtype(self.subject.precision))

    def attention(self, request: Request) -> str:
        """The attention kernel of a UNet call in PyTorch."""
        return attention_kernel(step_work(self._pipe, request))

    def burst(self, request: Request, part: str, count: int, seconds: float) -> list[Sample]:
        """Time calls of a part, whose work is made once for a request: see `Bench.burst`."""
        if (timed := getattr(self._pipe, "timed", None)) is not None:  # of a peer that has no call for a part
            return cast("list[Sample]", timed(request, part, count, self._bench.timer))
        if request != self._request:
            self._request, self._bench = request, Bench({}, self._bench.timer)
        if part not in self._bench.works:
            own = getattr(self._pipe, "works", None)  # of a peer whose parts are not diffusers' modules
            self._bench.works[part] = own[part](request) if own else WORKS[part](self._pipe, request)
        calls = self.subject.cache_interval if part == UNET else 1
        samples = self._bench.burst(part, math.ceil(count / calls), seconds)
        self._note_gpu_memory()
        return [sample.over(calls) for sample in samples]

    def _note_gpu_memory(self) -> None:
        """Note what the process holds on the GPU, between timed calls: allocators keep what they once took."""
        device = self._bench.timer.device
        seen = Memory(peak_gpu=gpu_used(device), peak_torch=torch_peak(device))
        self._memory = self._memory.with_peaks_of(seen)

    def memory(self) -> Memory:
        """What it took until now."""
        if not self.config.isolate:
            return self._memory
        return replace(self._memory, peak_rss=max(peak_rss() - self._memory.base_rss, 0))

    def close(self) -> None:
        """Unload the subject, whatever it is doing."""
        if self._pipe is not None:
            close_subject(self.subject, self._pipe)
        self._pipe, self._bench = None, Bench({}, self._bench.timer)


def _caching(subject: Subject) -> list[str]:
    """What a report says of a subject that caches steps."""
    more = subject.cache_interval - 1
    said = f"{subject.label}: its UNet step is the mean of a whole call and the {more} that reuse{'s'[more > 1 :]} it"
    return [f"{said}; its likeness is to eager PyTorch that computes every step"] if subject.caches else []


class IsolatedRunner:
    """A LocalRunner in a process of its own, which ends with `close`, and when this process is gone."""

    def __init__(self, subject: Subject, config: RunConfig) -> None:
        self.subject = subject
        self._busy = False
        name = f"sdkd compare: {subject.label}"
        self._process, self._connection = processes.start_connected(serve, (subject, config), name, PRELOAD)

    def __getattr__(self, name: str) -> Any:
        """A method of a LocalRunner that is in DOING, called there."""
        if name not in DOING:
            raise AttributeError(name)
        return functools.partial(self._ask, name)

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
        return processes.gone(self._process, seconds)


def _how_it_ended(status: int | None, doing: str) -> str:
    """In words how a process ended while it was doing something, and what to do about it."""
    cause = ended_by(status)
    if status is None or status >= 0:
        return f"with {cause} while {doing}: look at what it printed above"
    if cause == "SIGKILL":
        return (
            f"by {cause} while {doing}: most likely the system ran out of memory; compare fewer subjects at once, or "
            "give a smaller --size or --batch"
        )
    return f"by {cause} while {doing}: a library of its target crashed; build its engines again, or try another version"


def serve(connection: Connection, subject: Subject, config: RunConfig) -> None:
    """The child: answer calls of a LocalRunner's methods until the parent sends None or is gone."""
    processes.begin()
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
