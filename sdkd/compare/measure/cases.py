"""The subjects while they are measured: which are loaded, and the timed phases."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdkd.bundle.memory import free_gpu_memory, free_memory
from sdkd.compare.measure.calls import TEXT_ENCODER, UNET, VAE_DECODER, Request
from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.isolation import IsolatedRunner
from sdkd.compare.measure.runner import Drawn, LocalRunner, Opened, RunConfig, SubjectRunner
from sdkd.compare.measure.subjects import Failed, Subject, size_on_disk
from sdkd.compare.measure.timing import Bench, Part, Sample, Timed, interleave
from sdkd.core.console import Progress, within
from sdkd.errors import EngineError

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN_BYTES = 2_000_000_000  # of weights that are on no disk: a full-size pipeline in half precision
MEMORY_FACTOR = 3  # float32 in memory from half on disk, activations, packed copies
PROCESS_BYTES = 400_000_000  # of a process of its own beside the case: libraries' data, a GPU's context
MEMORY_SHARE = 0.5  # of what is free: subjects are kept loaded together while they fit into it
ROUNDS_ONE_AT_A_TIME = 3  # each round opens every model again
COMPONENT_SECONDS, COMPONENT_ROUNDS = 0.3, 3  # of text encoder and VAE: once per image, not per step


@dataclass
class Case:
    """One subject while it is measured."""

    subject: Subject
    opened: Opened | None = None  # of the first time
    first_call_s: float = 0.0
    unet_calls: int = 0
    memory: Memory | None = None
    attention: str | None = None
    repeatable: bool = True
    failed: Failed | None = None  # set where it could not be measured: it is left out from there on
    images: list[Image] = field(default_factory=list)
    image_samples: list[list[Sample]] = field(default_factory=list)
    parts: Timed = field(default_factory=dict)

    @property
    def step_samples(self) -> list[list[Sample]]:
        """Samples of the UNet step, by round."""
        return self.parts[UNET]


class LoadedSubjects:
    """The runners of loaded subjects: all of them with `keep_loaded`, otherwise only the last one asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._loaded: dict[str, tuple[Case, SubjectRunner]] = {}

    def runner(self, case: Case) -> SubjectRunner:
        """The case's runner, its subject loaded if need be. Raises what loading raises."""
        label = case.subject.label
        if label not in self._loaded:
            if not self.config.keep_loaded:
                self.finish()
            kind = IsolatedRunner if self.config.isolate else LocalRunner
            runner: SubjectRunner = kind(case.subject, self.config)
            self._loaded[label] = case, runner
            opened = runner.open()
            case.opened = case.opened or opened
            self.config = replace(self.config, size=self.config.size or opened.size)
        return self._loaded[label][1]

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


def first_opened(cases: Sequence[Case], loaded: LoadedSubjects) -> Opened | None:
    """The first subject that opens, and stays open: size, scheduler and guidance copies are all subjects'."""
    for case in cases:
        with loaded.trying(case):
            loaded.runner(case)
        if case.opened is not None:
            return case.opened
    return None


def measured(cases: Sequence[Case], failed: Sequence[Failed] = ()) -> list[Case]:
    """The cases that did not fail; raises as `nothing_left` when all did, those that `failed` before among them."""
    if kept := [case for case in cases if not case.failed]:
        return kept
    raise nothing_left([*failed, *(case.failed for case in cases if case.failed)])


def nothing_left(failed: Sequence[Failed]) -> Exception:
    """The error to end with when every subject failed: its own of the only one, EngineError with all reasons."""
    first = failed[0]
    if len(failed) == 1 and first.error is not None:
        return first.error
    words = "; ".join(f"{one.subject.label!r}: {one.reason}" for one in failed)
    found = EngineError(f"no subject could be measured: {words}")
    found.__cause__ = first.error
    return found


def first_images(cases: Sequence[Case], loaded: LoadedSubjects, request: Request, progress: Progress) -> None:
    """Load each subject and make its images, timing the load and the first call (compilation included)."""
    for place, case in enumerate(cases):
        progress(f"{case.subject.label}: loading", place / len(cases))
        part = within(progress, place / len(cases), (place + 1) / len(cases), f"{case.subject.label}: ")
        with loaded.trying(case):
            _first_images(case, loaded, request, part)


def _first_images(case: Case, loaded: LoadedSubjects, request: Request, progress: Progress) -> None:
    runner = loaded.runner(case)
    made: dict[int, Image] = {}
    for prompt in range(len(request.prompts)):
        progress(f"image {prompt + 1} of {len(request.prompts)}", prompt / len(request.prompts))
        drawn = runner.images(request, prompt)
        made.update(zip(request.numbers(prompt), drawn.images, strict=True))
        if prompt == 0:
            case.first_call_s, case.unet_calls = drawn.sample.wall_s, drawn.unet_calls
    case.images = [made[number] for number in sorted(made)]
    if case.subject.is_eager:
        case.attention = runner.attention(request)


def time_images(cases: Sequence[Case], loaded: LoadedSubjects, request: Request, runs: int, progress: Progress) -> None:
    """Time `runs` whole calls in rounds over the subjects, and see whether equal seeds give equal images again."""
    order, shuffle = list(cases), random.Random(request.seed)  # noqa: S311 (an order, not a secret)
    for turn in range(runs):
        prompt = turn % len(request.prompts)
        shuffle.shuffle(order)
        for place, case in enumerate(order):
            if case.failed:
                continue
            progress("timing whole images", (turn + place / len(order)) / runs)
            with loaded.trying(case):
                drawn = loaded.runner(case).images(request, prompt)
                case.image_samples.append([drawn.sample])
                case.repeatable &= _same(drawn, [case.images[number] for number in request.numbers(prompt)])


def _same(drawn: Drawn, before: Sequence[Image]) -> bool:
    return [image.tobytes() for image in drawn.images] == [image.tobytes() for image in before]


@dataclass(frozen=True)
class _BenchOf:
    """A runner as a Bench: what is timed is the request's."""

    runner: SubjectRunner
    request: Request

    def warm(self, part: str) -> float:
        return self.runner.warm(part, self.request)

    def burst(self, part: str, count: int) -> list[Sample]:
        return self.runner.burst(part, self.request, count)


def time_parts(
    cases: Sequence[Case], loaded: LoadedSubjects, request: Request, runs: int, min_seconds: float, progress: Progress
) -> None:
    """Time UNet calls in rounds over all subjects, and in some of the rounds text encoder and VAE, too."""

    def bench(case: Case) -> Bench:
        return _BenchOf(loaded.runner(case), request)

    by_label = {case.subject.label: case for case in cases}
    components = (TEXT_ENCODER, VAE_DECODER)
    few = COMPONENT_ROUNDS, min(COMPONENT_SECONDS, min_seconds), COMPONENT_ROUNDS  # once a round, or for the time
    samples = interleave(
        {label: functools.partial(bench, case) for label, case in by_label.items()},
        [Part(UNET, runs, min_seconds), *(Part(name, *few) for name in components)],
        rounds=None if loaded.config.keep_loaded else ROUNDS_ONE_AT_A_TIME,
        seed=request.seed,
        lost=lambda label, error: loaded.fail(by_label[label], error),
        progress=progress,
    )
    for case in cases:
        case.parts = samples[case.subject.label]
