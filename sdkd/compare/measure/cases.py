"""The subjects while they are measured: which are loaded, the timed phases, and the reference images."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdkd.bundle.memory import free_gpu_memory, free_memory
from sdkd.compare.measure.calls import TEXT_ENCODER, UNET, VAE_DECODER, Asked, Request
from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.quality import Likeness, likeness
from sdkd.compare.measure.runner import Drawn, IsolatedRunner, LocalRunner, Opened, RunConfig
from sdkd.compare.measure.scores import lpips_here
from sdkd.compare.measure.subjects import EAGER, STUDENT, TEACHER, Failed, Subject, size_on_disk
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


@dataclass
class Case:
    """One subject while it is measured."""

    subject: Subject
    opened: Opened | None = None  # of the first time
    first_call_s: float = 0.0
    unet_calls: int = 0
    memory: Memory | None = None
    attention: str | None = None
    repeatable: bool | None = None  # None: no image was made again
    failed: Failed | None = None  # set where it could not be measured: it is left out from there on
    images: list[Image] = field(default_factory=list)
    image_samples: list[list[Sample]] = field(default_factory=list)
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
    case.first_call_s, case.unet_calls = calls[0].sample.wall_s, calls[0].unet_calls
    case.images = in_order(calls)
    if case.first_call_s >= LONG_IMAGE_S and not case.subject.is_compiled:
        case.image_samples.append([calls[0].sample])
    if case.subject.is_eager:
        case.attention = runner.attention(request)


def in_order(calls: Sequence[Drawn]) -> list[Image]:
    """Images of one call per prompt as a report has them: the first of every prompt, then the second, ..."""
    return [image for turn in zip(*(call.images for call in calls), strict=True) for image in turn]


def time_images(cases: Sequence[Case], loaded: LoadedSubjects, asked: Asked, runs: int, progress: Progress) -> None:
    """Time `runs` whole calls in rounds over the subjects, and see whether equal seeds give equal images again.

    A case whose first call was timed takes no part in the first round.
    """
    order, shuffle = list(cases), random.Random(asked.seed)  # noqa: S311 (an order, not a secret)
    for turn in range(runs):
        prompt = turn % len(asked.prompts)
        shuffle.shuffle(order)
        for place, case in enumerate(order):
            if case.failed or len(case.image_samples) > turn:
                continue
            progress("timing whole images", (turn + place / len(order)) / runs)
            with loaded.trying(case):
                runner, request = loaded.runner(case), case.request(asked)
                drawn = runner.images(request, prompt)
                case.image_samples.append([drawn.sample])
                before = [case.images[number].tobytes() for number in request.numbers(prompt)]
                same = [image.tobytes() for image in drawn.images] == before
                case.repeatable = same and case.repeatable is not False


def time_parts(
    cases: Sequence[Case], loaded: LoadedSubjects, asked: Asked, runs: int, min_seconds: float, progress: Progress
) -> None:
    """Time UNet calls in rounds over all subjects, and in some of the rounds text encoder and VAE, too."""

    def timed(case: Case) -> Burst:
        return lambda part, count, seconds: loaded.runner(case).burst(case.request(asked), part, count, seconds)

    by_label = {case.subject.label: case for case in cases}
    rounds = COMPONENT_ROUNDS if loaded.config.keep_loaded else 1  # a model that is loaded again is warmed up again
    few = rounds, min(COMPONENT_SECONDS, min_seconds), rounds  # once a round, or for the time
    samples = interleave(
        {label: timed(case) for label, case in by_label.items()},
        [Part(UNET, runs, min_seconds), *(Part(name, *few) for name in (TEXT_ENCODER, VAE_DECODER))],
        rounds=None if loaded.config.keep_loaded else ROUNDS_ONE_AT_A_TIME,
        seed=asked.seed,
        lost=lambda label, error: loaded.fail(by_label[label], error),
        progress=progress,
    )
    for case in cases:
        case.parts = samples[case.subject.label]


Key = tuple[str, str, Generation | None, int]
"""What eager images depend on: model, precision, steps, guidance scale and scheduler, and the cache interval."""


def _key(subject: Subject, precision: str | None = None, interval: int = 1) -> Key:
    return subject.model_key, precision or subject.precision, subject.run, interval


@dataclass
class ReferenceImages:
    """Eager images by what they depend on, with their label; `notes` say which could not be made and why."""

    by_key: dict[Key, tuple[str, Sequence[Image]]] = field(default_factory=dict)
    teacher: Subject | None = None
    notes: list[str] = field(default_factory=list)

    def to_own(self, subject: Subject, images: Sequence[Image]) -> Likeness | None:
        """How far images are from eager float32 of the subject's own model, every step computed; None for that subject
        itself.
        """
        return None if subject.is_reference else self._distance(_key(subject, "fp32"), images)

    def to_own_cached(self, subject: Subject, images: Sequence[Image]) -> Likeness | None:
        """The same, of eager float32 that caches steps as the subject does: what its engines are judged by."""
        return self._distance(_key(subject, "fp32", subject.cache_interval), images)

    def half_to_own(self, subject: Subject) -> Likeness | None:
        """How far eager images in the half precision of an engine, of eight bits in that which it is judged in, are
        from eager float32, both cached as it is.
        """
        half = self.by_key.get(_key(subject, subject.judged_in, subject.cache_interval))
        if half is None or subject.is_eager or subject.precision == "fp32":
            return None
        return self._distance(_key(subject, "fp32", subject.cache_interval), half[1])

    def to_teacher(self, subject: Subject, images: Sequence[Image]) -> Likeness | None:
        """How far a student's images are from the teacher's eager float32 ones, each drawn as it is run."""
        if subject.role != STUDENT or self.teacher is None:
            return None
        return self._distance(_key(self.teacher, "fp32"), images)

    def _distance(self, key: Key, images: Sequence[Image]) -> Likeness | None:
        if (found := self.by_key.get(key)) is None:
            return None
        return likeness(images, found[1], found[0], lpips_here())


def find_references(cases: Sequence[Case], asked: Asked, loaded: LoadedSubjects, progress: Progress) -> ReferenceImages:
    """Take the references from the subjects, and make those that are missing (untimed, after all timing).

    One that failed gives its images where it had made them all, and is not tried again.
    """
    teacher = next((case.subject for case in cases if case.subject.role == TEACHER), None)
    found, tried = ReferenceImages(teacher=teacher), set[Key]()
    for case in (case for case in cases if case.subject.is_eager):
        key = _key(case.subject, None, case.subject.cache_interval)
        tried.add(key)
        if case.images:
            found.by_key.setdefault(key, (case.subject.label, case.images))
    missing = {key: subject for key, subject in _references(cases).items() if key not in tried}
    loaded.config = replace(loaded.config, untimed=True)
    for place, (key, subject) in enumerate(missing.items()):
        progress(f"reference images of {subject.label}", place / len(missing))
        case = Case(subject)
        with loaded.trying(case):  # the measurement is done, and must not be lost for a reference
            runner = loaded.runner(case)
            calls = [runner.images(case.request(asked), prompt) for prompt in range(len(asked.prompts))]
            loaded.unload(case)
            found.by_key[key] = subject.label, in_order(calls)
        if case.failed:
            found.notes.append(f"no reference images of {subject.label}: {case.failed.reason}")
    return found


def _references(cases: Sequence[Case]) -> dict[Key, Subject]:
    """The eager subjects that cases are held against, each run as they are: float32, and the half that an engine is
    judged in; for one that caches steps every step computed, and cached as it is.
    """
    wanted = {}
    for subject in (case.subject for case in cases if not case.failed):
        own = subject.cache_interval
        for precision, interval in dict.fromkeys((("fp32", 1), ("fp32", own), (subject.judged_in, own))):
            made = replace(subject, label="-", target=EAGER, precision=precision, bundle=None, cache_interval=interval)
            wanted[_key(made, None, interval)] = replace(made, label=f"{subject.model_label} {made.runs_as}")
    return wanted
