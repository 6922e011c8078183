"""The subjects while they are measured: open pipelines, equal images from equal noise, and the timed phases."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdkd.compare.environment import attention_kernel
from sdkd.compare.measure import Enter, Sample, Timer, Work, interleave
from sdkd.compare.subjects import (
    Subject,
    close_subject,
    compiling,
    count_parameters,
    native_size,
    open_subject,
    size_on_disk,
)
from sdkd.console import Progress, within
from sdkd.contract import check_size, size_multiple
from sdkd.errors import EngineError, InputError
from sdkd.targets import require

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN_BYTES = 2_000_000_000  # of weights that are on no disk: a full-size pipeline in half precision
MEMORY_FACTOR = 3  # float32 in memory from half on disk, activations, packed copies
MEMORY_SHARE = 0.5  # of what is free: pipelines are kept open together while their weights fit into it
ROUNDS_ONE_AT_A_TIME = 3  # each round opens every model again
DRAG: dict[str, Callable[[], object]] = {}  # by label: called in every timed UNet call; tests plant delays here


@dataclass(frozen=True)
class Request:
    """What every subject is asked to do."""

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    seed: int
    size_px: int
    batch: int = 1  # images per call
    scheduler: str | None = None  # as `sdkd generate` takes it; None: each model's own

    @property
    def guided(self) -> bool:
        """Whether the conditional and the unconditional half go through the UNet together."""
        return self.guidance_scale > 1

    @property
    def unet_batch(self) -> int:
        """Latents per UNet call."""
        return self.batch * (2 if self.guided else 1)

    @property
    def image_prompts(self) -> tuple[str, ...]:
        """The prompt of every image: the first image of each prompt, then the second of each, and so on."""
        return self.prompts * self.batch

    def numbers(self, prompt: int) -> list[int]:
        """Numbers of the images that one call makes for prompt number `prompt`; image n starts from `seed + n`."""
        return list(range(prompt, len(self.image_prompts), len(self.prompts)))


@dataclass
class Case:
    """One subject while it is measured."""

    subject: Subject
    timer: Timer = field(default_factory=Timer)
    load_s: float = 0.0
    first_call_s: float = 0.0
    rss_growth_bytes: int = 0
    unet_parameters: int = 0
    parameters: int = 0
    attention: str | None = None
    repeatable: bool = True
    failure: str = ""  # why the subject is left out
    images: list[Image] = field(default_factory=list)
    image_samples: list[list[Sample]] = field(default_factory=list)
    step_samples: list[list[Sample]] = field(default_factory=list)


class Pool:
    """Open pipelines: all of them when `together`, otherwise only the last one asked for."""

    def __init__(self, device: str, together: bool, scheduler: str | None = None) -> None:
        self.device, self.together, self.scheduler = device, together, scheduler
        self._open: dict[str, tuple[Subject, Any, dict[str, Work]]] = {}

    def get(self, subject: Subject) -> Any:
        """The subject's pipeline, opened if need be."""
        return self._entry(subject)[1]

    def work(self, subject: Subject, name: str, make: Callable[[Any], Work]) -> Work:
        """What is timed on the subject's pipeline, made once each time the pipeline is opened."""
        _, pipe, works = self._entry(subject)
        if name not in works:
            works[name] = make(pipe)
        return works[name]

    def _entry(self, subject: Subject) -> tuple[Subject, Any, dict[str, Work]]:
        if subject.label not in self._open:
            if not self.together:
                self.close()
            self._open[subject.label] = subject, open_subject(subject, self.device, self.scheduler), {}
        return self._open[subject.label]

    def close(self) -> None:
        """Let go of all pipelines."""
        for subject, pipe, _ in self._open.values():
            close_subject(subject, pipe)
        self._open.clear()
        gc.collect()


def fit_together(subjects: Sequence[Subject]) -> bool:
    """Whether all subjects, at MEMORY_FACTOR times their files, fit into MEMORY_SHARE of the free memory."""
    import psutil

    needed = MEMORY_FACTOR * sum(size_on_disk(subject) or UNKNOWN_BYTES for subject in subjects)
    return bool(needed < MEMORY_SHARE * psutil.virtual_memory().available)


def image_size(pipe: Any, size: int | None) -> int:
    """The asked image side in pixels, or the model's own; InputError when it does not fit the model's levels."""
    found = size or native_size(pipe)
    check_size(found, found, size_multiple(pipe.unet.config, pipe.vae.config))
    return found


def make_images(pipe: Any, request: Request, prompt: int) -> list[Image]:
    """The images of one prompt, from noise that is equal for every subject: float32 on the CPU, then cast."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(request.seed + number) for number in request.numbers(prompt)]
    side = request.size_px // pipe.vae_scale_factor
    shape = (1, pipe.vae.config.latent_channels, side, side)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])  # [batch, c, h, w]
    images: list[Image] = pipe(
        [request.prompts[prompt]] * request.batch,
        height=request.size_px,
        width=request.size_px,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=generators,  # for schedulers that add noise in every step
        latents=noise.to(pipe.device, pipe.text_encoder.dtype),
    ).images
    return images


def step_work(pipe: Any, request: Request) -> Work:
    """One UNet call as the pipeline makes it: the first prompt's embeddings, seeded latents, a middle timestep."""
    import torch

    device, unet = pipe.device, pipe.unet
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(request.prompts[0], device, request.batch, request.guided)[:2]
    states = torch.cat([negative, prompt]) if request.guided else prompt  # [batch, sequence, context]
    side = request.size_px // pipe.vae_scale_factor
    generator = torch.Generator("cpu").manual_seed(request.seed)
    sample = torch.randn((request.unet_batch, unet.config.in_channels, side, side), generator=generator)
    sample = sample.to(device, states.dtype)
    timestep = torch.tensor(500, device=device)

    def work() -> object:
        with torch.no_grad():
            return unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]

    return work


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def common_size(subjects: Sequence[Subject], pool: Pool, size: int | None) -> tuple[int, str]:
    """The image side in pixels for all subjects and the scheduler's name, from the first subject's pipeline.

    Opens that pipeline once before anything is timed, so that no subject pays for importing diffusers.
    """
    pipe = pool.get(subjects[0])
    found = image_size(pipe, size), type(pipe.scheduler).__name__
    pool.close()
    return found


def load(case: Case, pool: Pool, size_px: int) -> None:
    """Open the subject, timed; InputError when it cannot make images of the common size."""
    if not case.subject.in_torch:
        require(case.subject.target)  # the library's own import is not the engine's load
    case.load_s = Timer().time(lambda: pool.get(case.subject)).wall_s
    pipe = pool.get(case.subject)
    try:
        image_size(pipe, size_px)
    except InputError as error:
        raise InputError(f"{case.subject.label!r}: {error}") from error
    case.timer = Timer(str(pipe.device))
    case.unet_parameters, case.parameters = count_parameters(case.subject, pipe)


def timed_call(case: Case, pool: Pool, request: Request, prompt: int) -> tuple[list[Image], Sample]:
    """Make the images of one prompt in one call and time it end to end."""
    pipe, made = pool.get(case.subject), list["Image"]()
    sample = case.timer.time(lambda: made.extend(make_images(pipe, request, prompt)))
    return made, sample


def first_images(cases: Sequence[Case], pool: Pool, request: Request, progress: Progress) -> None:
    """Load each subject and make its images, timing the load and the first call (compilation included).

    A subject that the compiler fails on gets a `failure`, in words, and no images.
    """
    for place, case in enumerate(cases):
        progress(f"{case.subject.label}: loading", place / len(cases))
        part = within(progress, place / len(cases), (place + 1) / len(cases), f"{case.subject.label}: ")
        try:
            _first_images(case, pool, request, part)
        except EngineError as error:
            if not case.subject.is_compiled:
                raise
            case.failure = f"{case.subject.label} was left out: {error}"


def _first_images(case: Case, pool: Pool, request: Request, progress: Progress) -> None:
    before = _rss()
    load(case, pool, request.size_px)
    made: dict[int, Image] = {}
    for prompt in range(len(request.prompts)):
        progress(f"image {prompt + 1} of {len(request.prompts)}", prompt / len(request.prompts))
        with compiling(case.subject):
            images, sample = timed_call(case, pool, request, prompt)
        made.update(zip(request.numbers(prompt), images, strict=True))
        if prompt == 0:
            case.first_call_s, case.rss_growth_bytes = sample.wall_s, _rss() - before
    case.images = [made[number] for number in sorted(made)]
    if case.subject.is_eager:
        case.attention = attention_kernel(step_work(pool.get(case.subject), request))


def time_images(cases: Sequence[Case], pool: Pool, request: Request, runs: int, progress: Progress) -> None:
    """Time `runs` whole calls in rounds over the subjects, and see whether equal seeds give equal images again."""
    order, shuffle = list(cases), random.Random(request.seed)  # noqa: S311 (an order, not a secret)
    for turn in range(runs):
        prompt = turn % len(request.prompts)
        shuffle.shuffle(order)
        for place, case in enumerate(order):
            progress("timing whole images", (turn + place / len(order)) / runs)
            images, sample = timed_call(case, pool, request, prompt)
            case.image_samples.append([sample])
            before = [case.images[number] for number in request.numbers(prompt)]
            case.repeatable &= [image.tobytes() for image in images] == [image.tobytes() for image in before]


def dragged(work: Work, label: str) -> Work:
    """The work with the delay that a test planted for this subject; the work itself without one."""
    drag = DRAG.get(label)
    return work if drag is None else lambda: (drag(), work())


def time_steps(
    cases: Sequence[Case], pool: Pool, request: Request, runs: int, min_seconds: float, progress: Progress
) -> None:
    """Time UNet calls in rounds over all subjects."""

    def enter(subject: Subject) -> Enter:
        return lambda: pool.work(subject, "step", lambda pipe: dragged(step_work(pipe, request), subject.label))

    samples = interleave(
        {case.subject.label: enter(case.subject) for case in cases},
        {case.subject.label: case.timer for case in cases},
        runs=runs,
        min_seconds=min_seconds,
        rounds=None if pool.together else ROUNDS_ONE_AT_A_TIME,
        seed=request.seed,
        progress=progress,
    )
    for case in cases:
        case.step_samples = samples[case.subject.label]
