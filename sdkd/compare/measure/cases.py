"""The subjects while they are measured: which are loaded, their first images, and the timed phases."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdkd.bundle.memory import free_gpu_memory, free_memory
from sdkd.compare.measure.calls import TEXT_ENCODER, UNET, VAE_DECODER, Asked, Request
from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.runner import Drawn, IsolatedRunner, LocalRunner, Opened, RunConfig
from sdkd.compare.measure.subjects import Failed, Subject, size_on_disk
from sdkd.compare.measure.timing import Burst, Part, Sample, Timed, interleave
from sdkd.core.console import Progress, within
from sdkd.errors import EngineError
from sdkd.models.generation import Generation

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN_BYTES = 2_000_000_000  # of weights that are on no disk: a full-size pipeline in half precision
MEMORY_FACTOR = 3  # float32 in memory from half on disk, activations, packed copies
PROCESS_BYTES = 400_000_000  # of a process of its own beside the case: libraries' data, a GPU's context
MEMORY_SHARE = 0.5  # of what is free: subjects are kept loaded together while they fit into it
ROUNDS_ONE_AT_A_TIME = 3  # each round opens every model again
COMPONENT_SECONDS, COMPONENT_ROUNDS = 0.3, 3  # of text encoder and VAE: once per image, not per step
LONG_IMAGE_S = 20.0  # a first call this long is a timed one, too: what happens only once is small beside it
IMAGE = "image"


@dataclass(frozen=True)
class Calls:
    """How much is timed of each subject: whole images, UNet calls, and for how many seconds these at least."""

    images: int
    runs: int
    min_seconds: float


@dataclass
class Case:
    """One subject while it is measured."""

    subject: Subject
    opened: Opened | None = None  # of the first time
    first: Sample | None = None  # its first call
    unet_calls: int = 0
    memory: Memory | None = None
    attention: str | None = None
    repeatable: bool | None = None  # None: no image was made again
    failed: Failed | None = None  # set where it could not be measured: it is left out from there on
    images: list[Image] = field(default_factory=list)
    parts: Timed = field(default_factory=dict)

    @property
    def run(self) -> Generation:
        """Its steps, guidance scale and scheduler, that of the comparison where the subject had none."""
        assert self.subject.run is not None
        return self.subject.run

    def request(self, asked: Asked) -> Request:
        """What it is asked to do, once it is open."""
        assert self.opened is not None
        interval = self.subject.cache_interval
        return Request(**vars(asked), run=self.run, copies=self.opened.copies, cache_interval=interval)

    @property
    def first_counts(self) -> bool:
        """Whether a call right after it was opened is as good as a later one."""
        return self.first is not None and self.first.wall_s >= LONG_IMAGE_S and not self.subject.is_compiled

    @property
    def image_samples(self) -> list[list[Sample]]:
        """Samples of whole calls, by round."""
        return self.parts[IMAGE]

    @property
    def step_samples(self) -> list[list[Sample]]:
        """Samples of the UNet step, by round."""
        return self.parts[UNET]


class LoadedSubjects:
    """The runners of loaded subjects: all of them with `keep_loaded`, otherwise only the last one asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._loaded: dict[str, tuple[Case, LocalRunner | IsolatedRunner]] = {}

    def runner(self, case: Case) -> LocalRunner | IsolatedRunner:
        """The case's runner, its subject loaded if need be. Raises what loading raises."""
        label = case.subject.label
        if label not in self._loaded:
            if not self.config.keep_loaded:
                self.finish()
            runner = (IsolatedRunner if self.config.isolate else LocalRunner)(case.subject, self.config)
            self._loaded[label] = case, runner
            opened = runner.open()
            case.opened = case.opened or opened
            self.config = replace(self.config, size=self.config.size or opened.size)
        return self._loaded[label][1]

    def is_open(self, case: Case) -> bool:
        """Whether `runner` would not load it."""
        return case.subject.label in self._loaded

    def finish(self) -> None:
        """Note what memory the loaded subjects took, and unload them."""
        for case, runner in tuple(self._loaded.values()):
            with self.trying(case):
                found = runner.memory()
                case.memory = found if case.memory is None else case.memory.with_peaks_of(found)
        self.close()

    @contextlib.contextmanager
    def trying(self, case: Case) -> Iterator[None]:
        """Whatever is raised inside is this case's failure alone: it is unloaded, and the others go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a library raises must not cost the others' measurement
            self.fail(case, error)

    def fail(self, case: Case, error: Exception) -> None:
        """Note why a case failed, and unload it."""
        case.failed = Failed.of(case.subject, error)
        with contextlib.suppress(Exception):  # what failed may fail to close, too
            self.unload(case)

    def unload(self, case: Case) -> None:
        """Unload a case's subject."""
        if found := self._loaded.pop(case.subject.label, None):
            found[1].close()
        gc.collect()

    def close(self) -> None:
        """Unload all subjects, whatever they are doing."""
        while self._loaded:
            self.unload(next(iter(self._loaded.values()))[0])


def fit_together(subjects: Sequence[Subject], device: str, isolated: bool) -> bool:
    """Whether all subjects, at MEMORY_FACTOR times their files, fit into MEMORY_SHARE of the free memory."""
    sizes = [size_on_disk(subject) or UNKNOWN_BYTES for subject in subjects]
    needed = MEMORY_FACTOR * sum(sizes) + (PROCESS_BYTES * len(sizes) if isolated else 0)
    free = free_memory()
    if device.startswith("cuda"):
        free = min(free, free_gpu_memory())
    return needed < MEMORY_SHARE * free


def first_opened(cases: Sequence[Case], loaded: LoadedSubjects, failed: Sequence[Failed]) -> Opened:
    """The first subject that opens, and stays open: its size is all subjects'."""
    for case in cases:
        with loaded.trying(case):
            loaded.runner(case)
        if case.opened is not None:
            return case.opened
    raise nothing_left(failed, cases)


def measured(cases: Sequence[Case], failed: Sequence[Failed]) -> list[Case]:
    """The cases that did not fail; raises as `nothing_left` when all did, those that `failed` before among them."""
    if kept := [case for case in cases if not case.failed]:
        return kept
    raise nothing_left(failed, cases)


def nothing_left(failed: Sequence[Failed], cases: Sequence[Case] = ()) -> Exception:
    """The error to end with when every subject failed: its own of the only one, EngineError with all reasons."""
    every = [*failed, *(case.failed for case in cases if case.failed)]
    first = every[0].error
    if len(every) == 1 and first is not None:
        return first
    words = "; ".join(f"{one.subject.label!r}: {one.reason}" for one in every)
    found = EngineError(f"no subject could be measured: {words}")
    found.__cause__ = first
    return found


def first_images(cases: Sequence[Case], loaded: LoadedSubjects, asked: Asked, progress: Progress) -> None:
    """Load each subject and make its images, timing the load and the first call (compilation included)."""
    for place, case in enumerate(cases):
        progress(f"{case.subject.label}: loading", place / len(cases))
        part = within(progress, place / len(cases), (place + 1) / len(cases), f"{case.subject.label}: ")
        with loaded.trying(case):
            _first_images(case, loaded, asked, part)


def _first_images(case: Case, loaded: LoadedSubjects, asked: Asked, progress: Progress) -> None:
    runner = loaded.runner(case)
    request = case.request(asked)
    calls: list[Drawn] = []
    for prompt in range(len(request.prompts)):
        progress(f"image {prompt + 1} of {len(request.prompts)}", prompt / len(request.prompts))
        calls.append(runner.images(request, prompt))
    case.first, case.unet_calls = calls[0].sample, calls[0].unet_calls
    case.images = in_order(calls)
    if case.subject.is_eager:
        case.attention = runner.attention(request)


def in_order(calls: Sequence[Drawn]) -> list[Image]:
    """Images of one call per prompt as a report has them: the first of every prompt, then the second, ..."""
    return [image for turn in zip(*(call.images for call in calls), strict=True) for image in turn]


def time_cases(cases: Sequence[Case], loaded: LoadedSubjects, asked: Asked, calls: Calls, progress: Progress) -> None:
    """Time whole images and UNet calls in rounds over all subjects, and in some rounds text encoder and VAE, too.

    Images first, in rounds of their own; where not all subjects fit into memory, in the same rounds, since each opens
    every model again.
    """
    together, few = loaded.config.keep_loaded, min(COMPONENT_SECONDS, calls.min_seconds)
    images = Part(IMAGE, calls.images, 0.0, calls.images)
    count = COMPONENT_ROUNDS if together else 1  # a model that is loaded again is warmed up again
    parts = [Part(UNET, calls.runs, calls.min_seconds)]
    parts += [Part(name, count, few, count) for name in (TEXT_ENCODER, VAE_DECODER)]  # once a round, or for the time
    if together:
        _time(cases, loaded, asked, [images], calls.images, within(progress, 0.0, 0.5))
        _time([case for case in cases if not case.failed], loaded, asked, parts, None, within(progress, 0.5, 1.0))
    else:
        _time(cases, loaded, asked, [images, *parts], max(ROUNDS_ONE_AT_A_TIME, calls.images), progress)


def _time(
    cases: Sequence[Case],
    loaded: LoadedSubjects,
    asked: Asked,
    parts: Sequence[Part],
    rounds: int | None,
    progress: Progress,
) -> None:
    by_label = {case.subject.label: case for case in cases}
    timed = interleave(
        {label: _burst(case, loaded, asked) for label, case in by_label.items()},
        parts,
        rounds=rounds,
        seed=asked.seed,
        lost=lambda label, error: loaded.fail(by_label[label], error),
        progress=progress,
    )
    for case in cases:
        case.parts |= timed[case.subject.label]


def _burst(case: Case, loaded: LoadedSubjects, asked: Asked) -> Burst:
    turns = itertools.count()

    def burst(part: str, count: int, seconds: float) -> list[Sample]:
        if part == IMAGE:
            return [_image(case, loaded, asked, next(turns))]
        return loaded.runner(case).burst(case.request(asked), part, count, seconds)

    return burst


def _image(case: Case, loaded: LoadedSubjects, asked: Asked, turn: int) -> Sample:
    """Time one whole call, and see whether equal seeds give equal images again.

    Its first call stands for the first turn where that was a long one. A short one is preceded by another call when
    the subject was just opened.
    """
    assert case.first is not None
    if turn == 0 and case.first_counts:
        return case.first
    fresh, prompt = not loaded.is_open(case), turn % len(asked.prompts)
    runner, request = loaded.runner(case), case.request(asked)
    if fresh and not case.first_counts:
        runner.images(request, prompt)
    drawn = runner.images(request, prompt)
    before = [case.images[number].tobytes() for number in request.numbers(prompt)]
    same = [image.tobytes() for image in drawn.images] == before
    case.repeatable = same and case.repeatable is not False
    return drawn.sample
