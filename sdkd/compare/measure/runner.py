"""One subject where it is measured: opened, its images made, its parts timed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from engines.generate.long_prompts import cut_lines
from sdkd.compare.measure.calls import WORKS, Request, image_size, make_images, step_work, unet_calls
from sdkd.compare.measure.environment import Memory, attention_kernel, gpu_used, peak_rss, rss, torch_peak
from sdkd.compare.measure.pictures import Size, kind_of, note
from sdkd.compare.measure.subjects import Subject, close_subject, compiling, count_parameters, open_subject
from sdkd.compare.measure.timing import LocalBench, Sample, Timer
from sdkd.core.contract import unet_copies
from sdkd.targets.registry import require

if TYPE_CHECKING:
    from PIL.Image import Image


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@dataclass(frozen=True)
class RunConfig:
    """How subjects are measured; goes to other processes as it is."""

    device: str
    keep_loaded: bool = True  # all subjects at once; otherwise one at a time, loaded again when it is its turn
    isolate: bool = False  # each in a process of its own, whose peak of memory is then the subject's
    scheduler: str | None = None  # None: the model's own
    size: Size | None = None  # None: the model's own
    prompts: tuple[str, ...] = ()
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


class SubjectRunner(Protocol):
    """Loads, runs and times one subject: in this process (LocalRunner) or in one of its own (IsolatedRunner)."""

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
        """Unload the subject, whatever it is doing."""


class LocalRunner:
    """A SubjectRunner in this process."""

    def __init__(self, subject: Subject, config: RunConfig) -> None:
        self.subject, self.config = subject, config
        self._pipe: Any = None
        self._bench = LocalBench({}, Timer())
        self._request: Request | None = None
        self._memory = Memory()

    def open(self) -> Opened:
        """As a SubjectRunner."""
        import_libraries()
        self._use_threads()
        subject, base = self.subject, rss()
        self._memory = Memory(base_rss=base)
        if subject.has_engines:
            require(subject.target)  # the library's own import is not the engine's load
        load_s = Timer().time(self._load).wall_s
        device = str(self._pipe.device)
        self._bench = LocalBench({}, Timer(device))
        size = image_size(self._pipe, self.config.size)
        scheduler = type(self._pipe.scheduler).__name__
        counts, config = count_parameters(subject, self._pipe), self._pipe.unet.config
        copies = unet_copies(int(config.in_channels), int(config.out_channels))
        return Opened(load_s, device, size, scheduler, *counts, copies, self._notes())

    def _notes(self) -> tuple[str, ...]:
        given = note(self.subject.model_label, kind_of(self._pipe))
        cut = cut_lines(self._pipe, self.config.prompts)
        return (*([given] if given else []), *cut)

    def _load(self) -> None:
        self._pipe = open_subject(self.subject, self.config.device, self.config.scheduler)

    def _use_threads(self) -> None:
        import torch

        if self.config.threads != torch.get_num_threads():
            torch.set_num_threads(self.config.threads)

    def images(self, request: Request, prompt: int) -> Drawn:
        """As a SubjectRunner; EngineError in place of what torch.compile raises."""
        made: list[Image] = []
        with compiling(self.subject):
            sample = self._bench.timer.time(lambda: made.extend(make_images(self._pipe, request, prompt)))
        if not self._memory.growth:
            self._memory = replace(self._memory, growth=rss() - self._memory.base_rss)
        self._note_gpu_memory()
        return Drawn(made, sample, unet_calls(self._pipe))

    def attention(self, request: Request) -> str:
        """As a SubjectRunner."""
        return attention_kernel(step_work(self._pipe, request))

    def warm(self, part: str, request: Request) -> float:
        """As a SubjectRunner."""
        call_s = self._bench_for(part, request).warm(part)
        self._note_gpu_memory()
        return call_s

    def burst(self, part: str, request: Request, count: int) -> list[Sample]:
        """As a SubjectRunner."""
        samples = self._bench_for(part, request).burst(part, count)
        self._note_gpu_memory()
        return samples

    def _bench_for(self, part: str, request: Request) -> LocalBench:
        """The bench with this part's work, which is made once for a request."""
        if request != self._request:
            self._request, self._bench = request, LocalBench({}, self._bench.timer)
        if part not in self._bench.works:
            self._bench.works[part] = WORKS[part](self._pipe, request)
        return self._bench

    def _note_gpu_memory(self) -> None:
        """Note what the process holds on the GPU, between timed calls: allocators keep what they once took."""
        device = self._bench.timer.device
        seen = Memory(peak_gpu=gpu_used(device), peak_torch=torch_peak(device))
        self._memory = self._memory.with_peaks_of(seen)

    def memory(self) -> Memory:
        """As a SubjectRunner."""
        if not self.config.isolate:
            return self._memory
        return replace(self._memory, peak_rss=max(peak_rss() - self._memory.base_rss, 0))

    def close(self) -> None:
        """As a SubjectRunner."""
        if self._pipe is not None:
            close_subject(self.subject, self._pipe)
        self._pipe, self._bench = None, LocalBench({}, self._bench.timer)


# What every subject needs before it is timed. The server that their processes are forked from imports these, too, so
# nothing in them may start a thread that computes or touch a GPU: neither survives a fork.
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
    """Import what every subject needs, so that no subject's loading time contains it."""
    for name in LIBRARIES:
        importlib.import_module(name)
