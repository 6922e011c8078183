"""What is compared: a model on a target in a precision, how it is opened, and what it weighs."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engines.generate.image_inputs import as_pipeline
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import resident_bytes
from sdkd.bundle.quantized import Quantized
from sdkd.compare.measure.calls import as_drawn
from sdkd.compare.measure.peers import PEERS, Peer, Shape, open_peer
from sdkd.core.components import CACHED_UNET, COMPONENTS, TEXT_ENCODERS
from sdkd.core.contract import QUANTIZED, Precision, check_engine_precision, check_precision, torch_dtype
from sdkd.errors import EngineError, InputError, one_line
from sdkd.models.conditioning import family_of
from sdkd.models.fused import Lora, with_loras
from sdkd.models.generation import Generation
from sdkd.models.replacements import RANDOM, load_replacement, replacement_folder, with_vae
from sdkd.models.resolve import ModelSource, load_eager, resolve
from sdkd.models.step_caching import cache_steps, check_interval
from sdkd.targets.registry import check_target

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

EAGER, COMPILE = "eager", "compile"
IN_TORCH = (EAGER, COMPILE)  # targets that need no bundle
# `dynamic`: a subject is called with one shape, and must not be compiled otherwise because another model was before it.
COMPILER: dict[str, Any] = {"dynamic": False}
MOST_COMPILED = 64  # versions of one function; beyond, PyTorch would run it eagerly without a word
TEACHER, STUDENT = "teacher", "student"
WEIGHT_FOLDERS = ("unet", "vae", *TEXT_ENCODERS)


@dataclass(frozen=True)
class Subject:
    """One row of a comparison: a model (name or path) on `eager`, `compile`, a peer (`PEERS`) or an engine slot.

    A slot is `openvino`, `openvino-bf16`, ... `bundle` holds the engines, for peers the ONNX files; `role` says
    what the model is to the others (`teacher`, `student`, `model`). `replaced`: parts of the model that others stand
    for, (`vae` or `controlnet`, folder or hub id), and `loras` those fused into it, as the bundle was exported. `run`:
    steps, guidance scale and scheduler of its images; None: those of the comparison. `cache_interval`: of so many UNet
    calls one is whole (`sdkd.models.step_caching`).
    """

    label: str
    model: str | Path
    target: str = EAGER
    precision: str = "fp32"
    bundle: Path | None = None
    role: str = "model"
    replaced: tuple[tuple[str, str], ...] = ()
    loras: tuple[Lora, ...] = ()
    run: Generation | None = None
    cache_interval: int = 1

    def __post_init__(self) -> None:
        (check_engine_precision if self.has_engines else check_precision)(self.precision)
        check_interval(self.cache_interval, None if self.run is None or not self.caches else self.run.steps)
        if self.caches and not (self.is_eager or self.has_engines):
            raise InputError(f"subject {self.label!r} runs on {self.target!r}, which caches no steps: leave that out")
        if not self.in_torch and self.bundle is None:
            raise InputError(f"subject {self.label!r} runs on {self.target!r}, which needs a bundle: give one")

    @property
    def is_eager(self) -> bool:
        """Whether it runs in PyTorch, as loaded."""
        return self.target == EAGER

    @property
    def is_compiled(self) -> bool:
        """Whether it runs in PyTorch with a UNet that torch.compile compiled."""
        return self.target == COMPILE

    @property
    def in_torch(self) -> bool:
        """Whether it is opened from the model in PyTorch, and needs no bundle."""
        return self.target in IN_TORCH or (self.peer is not None and self.peer.from_model)

    @property
    def peer(self) -> Peer | None:
        """The other project's runtime that it runs on, None for ours and PyTorch's own."""
        return PEERS.get(self.target)

    @property
    def has_engines(self) -> bool:
        """Whether it runs on engines of its bundle."""
        return self.target not in IN_TORCH and self.peer is None

    @property
    def is_reference(self) -> bool:
        """Whether its images are the reference for its model: eager in float32, every step computed."""
        return self.is_eager and self.precision == "fp32" and not self.caches

    @property
    def is_quantized(self) -> bool:
        """Whether its UNet is an engine of eight bits."""
        return self.precision in QUANTIZED

    @property
    def judged_in(self) -> Precision:
        """The precision of eager PyTorch that its images are held against beside float32, and of its own latents.

        Its own; of eight bits the half precision of what else the engine computes: fp16 on a GPU, bf16 on a CPU.
        """
        if self.is_quantized:
            return "fp16" if check_target(self.target).runs_on_gpu else "bf16"
        return check_precision(self.precision)

    @property
    def caches(self) -> bool:
        """Whether some of its UNet calls reuse what another computed."""
        return self.cache_interval > 1

    @property
    def model_key(self) -> str:
        """What is equal for subjects of the same model with the same parts."""
        loras = (f"{lora.sha256} x {lora.scale}" for lora in self.loras)
        return " + ".join((str(self.model), *(name for _, name in self.replaced), *loras))

    @property
    def model_label(self) -> str:
        """A short name of the model for people: the label without its target, or the last part of the model's name."""
        for suffix in (self.runs_as, f"{self.target} cache {self.cache_interval}", self.target):
            if self.label.endswith(suffix) and (name := self.label.removesuffix(suffix).strip(" ,·-")):
                return name
        return re.split(r"[\\/]", str(self.model).rstrip("\\/"))[-1] or str(self.model)

    @property
    def runs_as(self) -> str:
        """Target and precision in one word, `eager`, `eager-bf16`, `openvino-bf16`, and the interval: ` cache 3`."""
        shown = self.precision == "fp32" or self.target.endswith(f"-{self.precision}")
        cached = f" cache {self.cache_interval}" if self.caches else ""
        return (self.target if shown else f"{self.target}-{self.precision}") + cached

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-") or "subject"


@dataclass(frozen=True)
class Failed:
    """A subject that could not be built or measured, and why, in one line; `error` is for --debug."""

    subject: Subject
    reason: str
    error: Exception | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(subject: Subject, error: Exception) -> Failed:
        """What ended a subject, in words; what its frames held in memory is let go of."""
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        return Failed(subject, one_line(error), error)


def check_subjects(subjects: Sequence[Subject]) -> None:
    """InputError when there is nothing to compare, or two subjects would share a label or a file name."""
    if not subjects:
        raise InputError("nothing to compare: give at least one subject")
    for what in ("label", "slug"):
        names = [getattr(subject, what) for subject in subjects]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"subject {what} {twice[0]!r} is used twice: give every subject its own")


def open_subject(subject: Subject, device: str = "cpu", shape: Shape | None = None) -> StableDiffusionPipeline:
    """A pipeline that makes the subject's images: in PyTorch in its precision on `device`, or from its bundle.

    `shape`: what will be asked of it, for peers that compile for one shape.

    Scheduler and latents are in the precision that the subject is judged in, on engines as in PyTorch: an engine that
    is judged by eager half precision has no rounding fewer. The scheduler is that of the subject's `run`, the model's
    own where it has none; InputError when it is unknown.
    """
    dtype = torch_dtype(subject.judged_in)
    if subject.peer is not None:
        source = _SOURCES[subject.peer.takes](subject, dtype, device)
        pipe = open_peer(subject.peer, source, subject.precision, device, shape)
    elif subject.in_torch:
        pipe = _in_torch(subject, dtype, device)
    else:
        from engines.pipelines.pipeline import load_pipeline

        assert subject.bundle is not None
        options: dict[str, Any] = {"torch_dtype": dtype, "cache_interval": subject.cache_interval}
        pipe = as_drawn(load_pipeline(subject.bundle, subject.target, **options))
    if subject.run is not None:
        from sdkd.models.schedulers import use_scheduler

        use_scheduler(pipe, subject.run.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _in_torch(subject: Subject, dtype: torch.dtype, device: str) -> Any:
    """A subject's model as a pipeline in PyTorch."""
    model = with_loras(resolve(subject.model), subject.loras)
    pipe = as_drawn(_with_parts(load_eager(model, torch_dtype=dtype), subject.replaced, dtype))
    cache_steps(pipe.unet, subject.cache_interval)
    pipe = pipe if device == "cpu" else pipe.to(device)
    if subject.is_compiled:
        import torch._dynamo

        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, MOST_COMPILED)
        pipe.unet.compile(**COMPILER)  # at its first call
    return pipe


def _bundle_of(subject: Subject, *_: Any) -> Bundle:
    assert subject.bundle is not None
    return Bundle.open(subject.bundle)


def weights_of(subject: Subject, *_: Any) -> ModelSource:
    """The model whose weights a subject draws with, LoRAs and another VAE in it; InputError for a ControlNet."""
    source = with_loras(resolve(subject.model), subject.loras)
    for part, name in subject.replaced:
        if part != "vae":
            raise InputError(f"{subject.target} takes no {part} ({name}): leave target {subject.target!r} out")
        source = with_vae(source, name)
    return source


_SOURCES: Mapping[str, Callable[..., Any]] = {
    "graphs": _bundle_of, "pipeline": _in_torch, "weights": weights_of
}  # fmt: skip


def _with_parts(pipe: Any, replaced: Sequence[tuple[str, str]], dtype: torch.dtype) -> Any:
    """An eager pipeline with other parts in place of its own, as export gives them to a bundle; ModelError if gone."""
    for part, name in replaced:
        module = load_replacement(part, name, dtype)
        if hasattr(pipe, part):
            setattr(pipe, part, module)
        else:
            pipe = as_pipeline(pipe, family_of(pipe).controlnet, {part: module})
    return pipe


@contextlib.contextmanager
def compiling(subject: Subject) -> Iterator[None]:
    """EngineError in place of what torch.compile raises when it fails on a compiled subject."""
    if not subject.is_compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        what = next(line for line in (*str(error).strip().splitlines(), type(error).__name__) if line.strip())
        raise EngineError(
            f"torch.compile failed ({what.strip()}). It needs a C++ compiler on a CPU and Triton on a GPU: install one "
            "(apt install g++), or leave the target out"
        ) from error


def close_subject(subject: Subject, pipe: Any) -> None:
    """Release the engines behind a pipeline; one in PyTorch goes with its last reference."""
    if subject.has_engines:
        for part in family_of(pipe).parts:
            getattr(pipe, part).close()
    elif hasattr(pipe, "close"):  # of a peer that keeps files
        pipe.close()


def count_parameters(subject: Subject, pipe: Any) -> tuple[int, int]:
    """Parameters of the UNet and of the whole pipeline (text encoders, UNet, VAE)."""
    if subject.bundle is not None:
        records = Bundle.open(subject.bundle).manifest.components
        every = (record.parameters for name, record in records.items() if name != CACHED_UNET)  # once, as in PyTorch
        return records["unet"].parameters, sum(every)
    if (known := getattr(pipe, "parameter_counts", None)) is not None:  # of a peer whose parts are no modules
        return cast("tuple[int, int]", known)
    parts = family_of(pipe).parts
    counts = {name: sum(parameter.numel() for parameter in getattr(pipe, name).parameters()) for name in parts}
    return counts["unet"], sum(counts.values())


def size_on_disk(subject: Subject) -> int | None:
    """Bytes of the weights (eager), engine or ONNX files; None where there is no file (random weights)."""
    if subject.bundle is not None:
        bundle = Bundle.open(subject.bundle)
        there = [name for name in COMPONENTS if name in bundle.manifest.components]
        names = [name for name in there if name != CACHED_UNET or subject.caches]
        if subject.has_engines:
            return sum(resident_bytes(bundle, bundle.engine(subject.target, name)) for name in names)
        return sum(bundle.component(name).total_bytes for name in names)
    path = resolve(subject.model).path
    homes = {part: replacement_folder(part, name) for part, name in subject.replaced if name != RANDOM}
    return None if path is None else weight_bytes(Path(path), homes)


def rounding_of(subject: Subject) -> Quantized | None:
    """What the record of a subject's UNet says of its rounding; None for one in float."""
    if not subject.is_quantized or subject.bundle is None:
        return None
    return Quantized.of(Bundle.open(subject.bundle).engine(subject.target, "unet").flags)


def has_random_weights(subject: Subject) -> bool:
    """Whether the model was never trained; a bundle knows even when its model is gone."""
    if subject.bundle is not None:
        return bool(Bundle.open(subject.bundle).manifest.source.get("random_weights"))
    return resolve(subject.model).random_weights


def weight_bytes(path: Path, homes: Mapping[str, Path] | None = None) -> int | None:
    """Bytes of the weight files of a pipeline folder or of a single file; None when there are none.

    `homes`: folders of parts that stand in for the pipeline's own.

    Where a component comes in several formats or variants, the first of: plain safetensors, any safetensors, bin.
    """
    if path.is_file():
        return path.stat().st_size
    patterns = ("*model.safetensors", "*model-*-of-*.safetensors", "*.safetensors", "*.bin")
    found = 0
    for name in WEIGHT_FOLDERS:
        home = (homes or {}).get(name, path / name)
        files = next((files for pattern in patterns if (files := list(home.glob(pattern)))), [])
        found += sum(file.stat().st_size for file in files)
    return found or None
