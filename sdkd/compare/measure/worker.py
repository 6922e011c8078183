"""One subject where it is measured, in this process or its own: opened, its images made, its parts timed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from engines.generate.long_prompts import cut_lines
from sdkd.compare.measure.calls import UNET, WORKS, Request, image_size, make_images, step_work, unet_calls
from sdkd.compare.measure.environment import attention_kernel
from sdkd.compare.measure.peaks import Memory, gpu_used, peak_rss, rss, torch_peak
from sdkd.compare.measure.pictures import Size, kind_of, note
from sdkd.compare.measure.subjects import Subject, close_subject, compiling, count_parameters, open_subject
from sdkd.compare.measure.timing import Sample, Stand, Timer, Work
from sdkd.core.contract import unet_copies
from sdkd.targets.registry import require

if TYPE_CHECKING:
    from PIL.Image import Image

Drag = float | Callable[[], object]
"""A delay that a test plants in a subject's timed UNet calls: seconds, or what is called."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to begin; goes to another process as it is."""

    subject: Subject
    device: str
    scheduler: str | None = None
    size: Size | None = None  # None: the model's own
    drag: Drag | None = None
    alone: bool = False  # whether its process is its own, so that the process's peak is the case's
    threads: int | None = None  # PyTorch's, where they are not what the process begins with
    prompts: tuple[str, ...] = ()  # that it will be asked for


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


class Seat(Protocol):
    """Where a subject is measured: a Worker, or one in a process of its own."""

    def open(self) -> Opened:
        """Load the subject, timed; InputError when it cannot make images of the asked size."""

    def images(self, request: Request, prompt: int) -> Drawn:
        """Make the images of one prompt in one call, timed end to end."""

    def attention(self, request: Request) -> str:
        """The attention kernel of a UNet call in PyTorch."""

    def warm(self, part: str, request: Request) -> float:
        """Call a part until it is stable; seconds of the last call."""

    def burst(self, part: str, request: Request, count: int) -> list[Sample]:
        """`count` timed calls of a part, after one that is thrown away or a warm-up."""

    def memory(self) -> Memory:
        """What it took until now."""

    def close(self) -> None:
        """Let go of the subject, whatever it is doing."""


class Worker:
    """A Seat in this process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._pipe: Any = None
        self._stand = Stand({}, Timer())
        self._request: Request | None = None
        self._memory = Memory()

    def open(self) -> Opened:
        """As a Seat."""
        import_libraries()
        self._use_threads()
        subject, base = self.job.subject, rss()
        self._memory = Memory(base_rss=base)
        if subject.has_engines:
            require(subject.target)  # the library's own import is not the engine's load
        load_s = Timer().time(self._load).wall_s
        device = str(self._pipe.device)
        self._stand = Stand({}, Timer(device))
        size = image_size(self._pipe, self.job.size)
        scheduler = type(self._pipe.scheduler).__name__
        counts, config = count_parameters(subject, self._pipe), self._pipe.unet.config
        copies = unet_copies(int(config.in_channels), int(config.out_channels))
        return Opened(load_s, device, size, scheduler, *counts, copies, self._notes())

    def _notes(self) -> tuple[str, ...]:
        given = note(self.job.subject.model_label, kind_of(self._pipe))
        cut = cut_lines(self._pipe, self.job.prompts)
        return (*([given] if given else []), *cut)

    def _load(self) -> None:
        self._pipe = open_subject(self.job.subject, self.job.device, self.job.scheduler)

    def _use_threads(self) -> None:
        import torch

        if self.job.threads and self.job.threads != torch.get_num_threads():
            torch.set_num_threads(self.job.threads)

    def images(self, request: Request, prompt: int) -> Drawn:
        """As a Seat; EngineError in place of what torch.compile raises."""
        made: list[Image] = []
        with compiling(self.job.subject):
            sample = self._timer.time(lambda: made.extend(make_images(self._pipe, request, prompt)))
        if not self._memory.growth:
            self._memory = replace(self._memory, growth=rss() - self._memory.base_rss)
        self._look_at_gpu()
        return Drawn(made, sample, unet_calls(self._pipe))

    def attention(self, request: Request) -> str:
        """As a Seat."""
        return attention_kernel(step_work(self._pipe, request))

    def warm(self, part: str, request: Request) -> float:
        """As a Seat."""
        call_s = self._bench(request, part).warm(part)
        self._look_at_gpu()
        return call_s

    def burst(self, part: str, request: Request, count: int) -> list[Sample]:
        """As a Seat."""
        samples = self._bench(request, part).burst(part, count)
        self._look_at_gpu()
        return samples

    @property
    def _timer(self) -> Timer:
        return self._stand.timer

    def _bench(self, request: Request, part: str) -> Stand:
        """The bench with this part's work, which is made once for a request."""
        if request != self._request:
            self._request, self._stand = request, Stand({}, self._timer)
        if part not in self._stand.works:
            work = WORKS[part](self._pipe, request)
            self._stand.works[part] = dragged(work, self.job.drag) if part == UNET else work
        return self._stand

    def _look_at_gpu(self) -> None:
        """Note what the process holds on the GPU, between timed calls: allocators keep what they once took."""
        device = self._timer.device
        seen = Memory(peak_gpu=gpu_used(device), peak_torch=torch_peak(device))
        self._memory = self._memory.with_peaks_of(seen)

    def memory(self) -> Memory:
        """As a Seat."""
        if not self.job.alone:
            return self._memory
        return replace(self._memory, peak_rss=max(peak_rss() - self._memory.base_rss, 0))

    def close(self) -> None:
        """As a Seat."""
        if self._pipe is not None:
            close_subject(self.job.subject, self._pipe)
        self._pipe, self._stand = None, Stand({}, self._timer)


def dragged(work: Work, drag: Drag | None) -> Work:
    """The work with the delay that a test planted; the work itself without one."""
    if drag is None:
        return work
    delay = drag if callable(drag) else lambda: time.sleep(drag)
    return lambda: (delay(), work())


# What every case needs before it is timed. The server that cases are forked from imports these, too, so nothing in them
# may start a thread that computes or touch a GPU: neither survives a fork.
LIBRARIES = (
    "accelerate",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers",
    "safetensors.torch",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "engines.pipelines.pipeline",
    "sdkd.models.resolve",
)


def import_libraries() -> None:
    """Import what every case needs, so that no case's load pays for it."""
    for name in LIBRARIES:
        importlib.import_module(name)
