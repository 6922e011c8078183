"""The subjects while they are measured: open pipelines, equal images from equal noise, and the timed phases."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdkd.compare.environment import attention_kernel
from sdkd.compare.measure import Enter, Sample, Timer, Work, interleave
from sdkd.compare.subjects import Subject, close_subject, count_parameters, native_size, open_subject, size_on_disk
from sdkd.console import Progress
from sdkd.contract import check_size, size_multiple
from sdkd.errors import InputError
from sdkd.targets import require

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN_BYTES = 2_000_000_000  # of weights that are on no disk: a full-size pipeline in half precision
MEMORY_FACTOR = 3  # float32 in memory from half on disk, activations, packed copies
MEMORY_SHARE = 0.5  # of what is free: pipelines are kept open together while their weights fit into it
ROUNDS_ONE_AT_A_TIME = 3  # each round opens every model again


@dataclass(frozen=True)
class Request:
    """What every subject is asked to do."""

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    seed: int
    size_px: int

    @property
    def unet_batch(self) -> int:
        """Latents per UNet call: with guidance the conditional and the unconditional half go together."""
        return 2 if self.guidance_scale > 1 else 1


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
    images: list[Image] = field(default_factory=list)
    image_samples: list[list[Sample]] = field(default_factory=list)
    step_samples: list[list[Sample]] = field(default_factory=list)


class Pool:
    """Open pipelines: all of them when `together`, otherwise only the last one asked for."""

    def __init__(self, device: str, together: bool) -> None:
        self.device, self.together = device, together
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
            self._open[subject.label] = subject, open_subject(subject, self.device), {}
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


def make_image(pipe: Any, request: Request, number: int) -> Image:
    """The image of prompt `number`, from noise that is equal for every subject: float32 on the CPU, then cast."""
    import torch

    generator = torch.Generator("cpu").manual_seed(request.seed + number)
    side = request.size_px // pipe.vae_scale_factor
    noise = torch.randn((1, pipe.vae.config.latent_channels, side, side), generator=generator)  # [1, c, h, w]
    image: Image = pipe(
        request.prompts[number],
        height=request.size_px,
        width=request.size_px,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=generator,  # for schedulers that add noise in every step
        latents=noise.to(pipe.device, pipe.text_encoder.dtype),
    ).images[0]
    return image


def step_work(pipe: Any, request: Request) -> Work:
    """One UNet call as the pipeline makes it: the first prompt's embeddings, seeded latents, a middle timestep."""
    import torch

    guided = request.unet_batch == 2
    device, unet = pipe.device, pipe.unet
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(request.prompts[0], device, 1, guided)[:2]
    states = torch.cat([negative, prompt]) if guided else prompt  # [batch, sequence, context]
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
    if not case.subject.is_eager:
        require(case.subject.target)  # the library's own import is not the engine's load
    case.load_s = Timer().time(lambda: pool.get(case.subject)).wall_s
    pipe = pool.get(case.subject)
    try:
        image_size(pipe, size_px)
    except InputError as error:
        raise InputError(f"{case.subject.label!r}: {error}") from error
    case.timer = Timer(str(pipe.device))
    case.unet_parameters, case.parameters = count_parameters(case.subject, pipe)


def timed_image(case: Case, pool: Pool, request: Request, number: int) -> tuple[Image, Sample]:
    """Make one image and time it end to end."""
    pipe, made = pool.get(case.subject), list["Image"]()
    sample = case.timer.time(lambda: made.append(make_image(pipe, request, number)))
    return made[0], sample


def first_images(cases: Sequence[Case], pool: Pool, request: Request, progress: Progress) -> None:
    """Load each subject and make its images, timing the load and the first image (compilation included)."""
    for place, case in enumerate(cases):
        progress(f"{case.subject.label}: loading", place / len(cases))
        before = _rss()
        load(case, pool, request.size_px)
        for number in range(len(request.prompts)):
            fraction = (place + number / len(request.prompts)) / len(cases)
            progress(f"{case.subject.label}: image {number + 1} of {len(request.prompts)}", fraction)
            image, sample = timed_image(case, pool, request, number)
            case.images.append(image)
            if number == 0:
                case.first_call_s, case.rss_growth_bytes = sample.wall_s, _rss() - before
        if case.subject.is_eager:
            case.attention = attention_kernel(step_work(pool.get(case.subject), request))


def time_images(cases: Sequence[Case], pool: Pool, request: Request, runs: int, progress: Progress) -> None:
    """Time `runs` whole images in rounds over the subjects, and see whether equal seeds give equal images again."""
    order, shuffle = list(cases), random.Random(request.seed)  # noqa: S311 (an order, not a secret)
    for turn in range(runs):
        number = turn % len(request.prompts)
        shuffle.shuffle(order)
        for place, case in enumerate(order):
            progress("timing whole images", (turn + place / len(order)) / runs)
            image, sample = timed_image(case, pool, request, number)
            case.image_samples.append([sample])
            case.repeatable &= image.tobytes() == case.images[number].tobytes()


def time_steps(
    cases: Sequence[Case], pool: Pool, request: Request, runs: int, min_seconds: float, progress: Progress
) -> None:
    """Time UNet calls in rounds over all subjects."""

    def enter(subject: Subject) -> Enter:
        return lambda: pool.work(subject, "step", lambda pipe: step_work(pipe, request))

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
