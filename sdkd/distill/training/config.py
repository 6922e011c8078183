"""What a training run does, as one frozen dataclass: its fields are the commands' options and the recipes' keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib import resources
from typing import Any

from sdkd.core.contract import check_engine_precision
from sdkd.core.help_page import CONSISTENCY, DATA, LORA, LOSSES, OPTIMIZER, ROUNDING, SAMPLES, SPEED, STATES, USUAL
from sdkd.core.numbers import SHARE, Bounds
from sdkd.distill.data.buckets import CROPS
from sdkd.distill.training.eight_bits import WEIGHT_BITS, rounding_problems, scheme_of
from sdkd.distill.training.pairs import PRESETS, feature_pairs
from sdkd.errors import InputError
from sdkd.families import STUDENT_NAMES, LossWeights, StudentSpec
from sdkd.models.generation import EMBEDDED_FEW_STEPS, FEW_STEPS, Generation
from sdkd.quantization.scheme import Scheme
from sdkd.students.blocks import student_spec


@dataclass(frozen=True)
class Objective:
    """One way of training: the command that does it, and what it needs."""

    command: str
    teacher: bool = False  # a frozen UNet that is asked in every step
    lora: bool = False  # update matrices alone are trained
    consistency: bool = False  # few steps: see consistency.py
    keeps: bool = False  # the result is a whole model that is run as the one it was made from

    @property
    def student(self) -> bool:
        """Whether a UNet of its own is trained from the teacher's."""
        return self.teacher and not self.lora


OBJECTIVES = {
    "distill": Objective("distill", teacher=True, keeps=True),
    "finetune": Objective("finetune", keeps=True),
    "lora": Objective("lora", lora=True),
    "consistency": Objective("distill", teacher=True, consistency=True),
    "consistency-lora": Objective("lora", teacher=True, lora=True, consistency=True),
}
_LORAS = tuple(name for name, objective in OBJECTIVES.items() if objective.lora)
_FEW_STEP = tuple(name for name, objective in OBJECTIVES.items() if objective.consistency)
_STUDENTS = tuple(name for name, objective in OBJECTIVES.items() if objective.student)
_WHOLE = tuple(name for name, objective in OBJECTIVES.items() if not objective.lora)
SAME = "same"  # the student that has all of its teacher's blocks
CHOICES: dict[str, tuple[str | None, ...]] = {
    "objective": tuple(OBJECTIVES),
    "pairs": (None, *PRESETS),
    "feature_norm": ("none", "variance"),
    "optimizer": ("adamw", "adamw8bit"),
    "schedule": ("cosine", "linear", "constant"),
    "lora_targets": ("attn", "attn+ff", "all"),
    "crop": CROPS,
    "latents": ("auto", "memory", "online"),
    "precision": ("bf16", "fp16", "fp32"),
}
_COUNT = Bounds(1, 10**9, whole=True)
_NUMBER = Bounds(0, 1e6)
# What the numbers may be. Beyond these nothing works (a rank above the widest layer adds nothing), or memory ends.
BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(("steps", "log_every", "keep", "max_images"), _COUNT),
    **dict.fromkeys(("save_every", "sample_every", "warmup"), Bounds(0, 10**9, whole=True)),
    **dict.fromkeys(("task_weight", "output_weight", "feature_weight", "snr_gamma", "noise_offset"), _NUMBER),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _NUMBER),
    **dict.fromkeys(("random_conditioning", "caption_dropout"), SHARE),
    "lora_dropout": Bounds(0, below=1),  # 1 would drop every update
    "solver_steps": Bounds(1, 1000, whole=True),
    "huber_c": Bounds(above=0, high=1e6),
    "target_ema": Bounds(0, below=1),
    "guidance_embedding": Bounds(0, 1 << 16, whole=True),
    "batch_size": Bounds(1, 1 << 16, whole=True),
    "accumulation": Bounds(1, 1 << 16, whole=True),
    "learning_rate": Bounds(above=0, high=1000),
    "ema": Bounds(0, below=1),
    "weight_bits": Bounds(4, 8, whole=True),
    "calibrate_images": Bounds(1, 1 << 16, whole=True),
    "lora_rank": Bounds(1, 1280, whole=True),
    "lora_alpha": Bounds(above=0, high=1e6),
    "resolution": Bounds(1, 1 << 14, whole=True),
    "workers": Bounds(0, 1024, whole=True),
    "sample_steps": Bounds(1, 1000, whole=True),
    "seed": Bounds(0, 2**63 - 1, whole=True),
}
# Pairs of numbers: what each may be, and an example.
_PAIRS = {"betas": (Bounds(0, below=1), "0.9 0.999"), "guidance": (Bounds(0, 1000), "5 15")}


def _setting(default: Any, text: str, *objectives: str, panel: str = USUAL) -> Any:
    """A field with its help; `objectives` are those that it means something for (all when none is named)."""
    return field(
        default=default, metadata={"help": text, "objectives": objectives or tuple(OBJECTIVES), "panel": panel}
    )


_loss, _few, _eight, _optimizer, _lora, _data, _speed, _state, _sample = (
    partial(_setting, panel=panel)
    for panel in (LOSSES, CONSISTENCY, ROUNDING, OPTIMIZER, LORA, DATA, SPEED, STATES, SAMPLES)
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; InputError lists everything that is wrong with them at once.

    Steps are optimizer steps everywhere. None means: what the student's spec (or the teacher) says.
    """

    objective: str = _setting("distill", "One of the command's: see --objective.")
    student: str = _setting("tiny", f"{STUDENT_NAMES}; same (consistency alone): the teacher's blocks.", *_STUDENTS)
    steps: int = _setting(1000, "Optimizer steps.")
    batch_size: int = _setting(32, "Images per forward pass and process.")
    accumulation: int = _optimizer(1, "Forward passes per step.")
    # losses
    task_weight: float | None = _loss(None, "Factor of the task loss. [default: the student's]", "distill")
    output_weight: float | None = _loss(None, "Factor of output KD. [default: the student's]", "distill")
    feature_weight: float | None = _loss(
        None, "Factor of feature KD. [default: the student's; of consistency 0]", *_STUDENTS
    )
    pairs: str | None = _loss(None, f"Feature pairs: {', '.join(PRESETS)}. [default: the student's]", *_STUDENTS)
    feature_norm: str = _loss("none", "variance: divide each pair by the variance of the teacher's.", *_STUDENTS)
    snr_gamma: float = _loss(0.0, "Gamma of min-SNR weights (5 is usual); 0: off.")
    noise_offset: float = _loss(0.0, "Strength of a constant added to each channel's noise; 0: off.")
    random_conditioning: float = _loss(0.0, "Share of images that get another image's caption.", "distill")
    # few steps
    guidance: tuple[float, float] = _few(
        (5.0, 15.0), "Range of w in the teacher's cond + w (cond - uncond): guidance scales less 1.", *_FEW_STEP
    )
    solver_steps: int = _few(50, "Points of the teacher's DDIM solver.", *_FEW_STEP)
    huber_c: float = _few(0.001, "c of the pseudo-Huber loss sqrt(d^2 + c^2) - c.", *_FEW_STEP)
    target_ema: float = _few(0.0, "Decay of the target network's weights; 0: the trained ones.", "consistency")
    guidance_embedding: int = _few(
        0, "Width of a guidance input (time_cond_proj_dim; public ones: 256); 0: none, w is built in.", "consistency"
    )
    # eight bits
    quantize: str | None = _eight(None, "Round forward passes as engines of int8 or fp8 do. [default: off]", *_WHOLE)
    weight_bits: int | None = _eight(
        None, f"With int8, 4 to 8: what holds for few holds for more. [default: {WEIGHT_BITS}, for CPUs without VNNI]",
        *_WHOLE,
    )  # fmt: skip
    calibrate_images: int | None = _eight(
        None, "Images drawn first, for the ranges that are rounded. [default: 4; of small models 8]", *_WHOLE
    )
    # optimizer
    optimizer: str = _optimizer("adamw", "adamw (fused) or adamw8bit (needs bitsandbytes).")
    learning_rate: float = _setting(1e-4, "Highest learning rate.")
    schedule: str = _optimizer("cosine", "cosine, linear or constant, after the warm-up.")
    warmup: int = _optimizer(0, "Steps of rising learning rate.")
    weight_decay: float = _optimizer(1e-2, "Of AdamW.")
    betas: tuple[float, float] = _optimizer((0.9, 0.999), "Of AdamW.")
    max_grad_norm: float = _optimizer(1.0, "Clip the gradient's global norm; 0: off.")
    ema: float = _optimizer(0.0, "Decay of averaged weights, which become the result; 0: off.", *_STUDENTS, "finetune")
    # LoRA
    lora_rank: int = _setting(16, "Rank of the update matrices.", *_LORAS)
    lora_alpha: float | None = _lora(None, "Scale is alpha / rank. [default: the rank]", *_LORAS)
    lora_targets: str = _lora("attn", "attn, attn+ff or all (convolutions too).", *_LORAS)
    lora_dropout: float = _lora(0.0, "Dropout before the update matrices.", *_LORAS)
    # data
    caption_dropout: float = _data(0.1, "Share of empty captions, for classifier-free guidance.")
    max_images: int | None = _data(None, "Use the first so many. [default: all]")
    resolution: int | None = _setting(None, "Pixels. [default: the model's]")
    buckets: bool = _data(False, "Keep aspect ratios: batches of equal shapes, about resolution^2 pixels.")
    crop: str = _data("center", "center or random.")
    flip: bool = _data(False, "Mirror every other image.")
    latents: str = _data("auto", "memory: encode all images first; online: in each step; auto: by their number.")
    workers: int = _speed(4, "Threads that read images.")
    # run
    precision: str = _speed("bf16", "Of the forward passes: bf16, fp32 or fp16 (CUDA). Trained weights are fp32.")
    checkpointing: bool = _speed(False, "Recompute activations: less memory, slower steps.")
    compile: bool = _speed(False, "torch.compile the UNets.")
    channels_last: bool = _speed(False, "Memory layout of the UNets that suits tensor cores.")
    device: str = _speed("auto", "auto, cpu or cuda.")
    seed: int = _setting(0, "Of all randomness.")
    log_every: int = _state(10, "Steps between records of training.jsonl.")
    save_every: int = _setting(0, "Steps between checkpoints; 0: one at the end, to go on from.")
    keep: int = _state(2, "Checkpoints to keep.")
    prompts: tuple[str, ...] = _sample((), "Validation prompts: a file with one a line, or 'one;another'.")
    sample_every: int = _sample(0, "Steps between validation images; 0: only with prompts, at the end.")
    sample_steps: int | None = _sample(None, "Denoising steps of a validation image. [default: 25; few steps: 4]")
    trackers: tuple[str, ...] = _state((), "tensorboard, wandb, beside training.jsonl.")

    def __post_init__(self) -> None:
        if self.quantize is not None:
            check_engine_precision(self.quantize)
        for name in (*_PAIRS, "prompts", "trackers"):  # YAML and JSON know lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if problems := list(self._problems()):
            raise InputError("; ".join(problems))

    @property
    def kind(self) -> Objective:
        """What the objective needs."""
        return OBJECTIVES[self.objective]

    @property
    def spec(self) -> StudentSpec:
        """The student's spec; InputError for one that has none, as "same"."""
        return student_spec(self.student)

    @property
    def student_name(self) -> str:
        """The student's full name."""
        return SAME if self.student == SAME else self.spec.name

    @property
    def pair_preset(self) -> str:
        """Name of the feature pairs: the one asked for, else the student's usual one."""
        return self.pairs or (SAME if self.student == SAME else self.spec.pairs)

    @property
    def weights(self) -> LossWeights:
        """Loss weights: those asked for, else the student's usual ones; of the other objectives the only loss is 1."""
        if self.objective != "distill":
            return LossWeights(1.0, 0.0, (self.feature_weight or 0.0) if self.objective == "consistency" else 0.0)
        asked = (self.task_weight, self.output_weight, self.feature_weight)
        return LossWeights(
            *(usual if own is None else own for own, usual in zip(asked, self.spec.weights, strict=True))
        )

    @property
    def scheme(self) -> Scheme | None:
        """How forward passes are rounded, as strictly as any engine of that precision; None: not at all."""
        return scheme_of(self.quantize, self.weight_bits)

    def generation(self, made: Generation | None) -> Generation | None:
        """How the result is to be run, of a model that is run as `made`: that, or in few steps where it learns those
        (guidance within what was trained); None where nothing tells, and of a LoRA that leaves it to its model.
        """
        if not self.kind.consistency:
            return made if self.kind.keeps else None
        if not self.guidance_embedding:
            return FEW_STEPS
        low, high = self.guidance
        usual = EMBEDDED_FEW_STEPS
        return replace(usual, guidance_scale=min(max(usual.guidance_scale, low + 1), high + 1))

    def to_json(self) -> dict[str, Any]:
        """The settings that mean something for the objective, with the student's defaults filled in."""
        every = asdict(self)
        found = {item.name: every[item.name] for item in settings_of(self.objective)}
        filled = {f"{name}_weight": value for name, value in self.weights._asdict().items()}
        filled |= {"student": self.student_name, "pairs": self.pair_preset} if self.kind.student else {}
        return found | {name: value for name, value in filled.items() if name in found}

    def _problems(self) -> Iterator[str]:
        yield from self._unknown()
        yield from filter(None, self._out_of_bounds())
        if self.student != SAME:
            feature_pairs(self.student, self.pairs if self.pairs in PRESETS else None)
        elif self.objective != "consistency":
            yield "student 'same' has all of its teacher's blocks, which is for --objective consistency: choose another"
            return  # it has no loss weights
        elif self.pairs:
            yield f"pairs {self.pairs!r} are of students with fewer blocks: leave them out with student 'same'"
        if not any(self.weights):
            yield "all three loss weights are 0, so there is nothing to learn: give at least one above 0"
        if self.ema and self.kind.lora:
            yield "ema averages whole UNets, a LoRA has none: leave it at 0"
        yield from rounding_problems(self.quantize, self.weight_bits, self.calibrate_images, lora=self.kind.lora)
        if 0 < self.guidance_embedding < 4:
            yield f"guidance_embedding {self.guidance_embedding} holds no sines and cosines: give 256, or 0 for none"
        if self.latents == "memory" and (self.flip or self.crop == "random" or self.buckets):
            yield "latents 'memory' holds one view of an image: leave flip, random crop and buckets off, or use online"

    def _out_of_bounds(self) -> Iterator[str]:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in BOUNDS and (value is not None or item.default is not None):
                yield BOUNDS[item.name].problem(item.name, value)
        for name, (bounds, example) in _PAIRS.items():
            pair: tuple[float, ...] = getattr(self, name)
            if len(pair) != 2:
                yield f"{name} {pair} are not two: give e.g. {example}"
            yield from (bounds.problem(name, number) for number in pair)
        if self.guidance[0] > self.guidance[-1]:
            yield f"guidance {self.guidance} is no range: give the smaller number first"

    def _unknown(self) -> Iterator[str]:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(choice) for choice in allowed if choice)
                yield f"{name} {getattr(self, name)!r} is unknown: choose one of {names}"
        for name in self.trackers:
            if name not in ("tensorboard", "wandb"):
                yield f"tracker {name!r} is unknown: choose tensorboard or wandb"


def objective_of(command: str, name: str | None = None) -> str:
    """The objective of a command by the name that its --objective gives it; InputError lists them. None: its usual."""
    named = {one.removesuffix(f"-{command}"): one for one, kind in OBJECTIVES.items() if kind.command == command}
    if (wanted := name or command) not in named:
        raise InputError(f"objective {name!r} is unknown to sdkd {command}: choose {' or '.join(named)}")
    return named[wanted]


def settings_of(objective: str) -> list[Any]:
    """The dataclass fields that mean something for an objective, in order."""
    return [item for item in fields(TrainConfig) if objective in item.metadata["objectives"]]


def make_config(objective: str, *layers: Mapping[str, Any]) -> TrainConfig:
    """A config from layers of settings (recipe, options), the last one winning; None in a layer leaves a value alone.

    InputError names keys that the objective does not have.
    """
    known = {item.name for item in settings_of(objective)}
    values = {key: value for layer in layers for key, value in layer.items() if value is not None}
    values = {key.replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(set(values) - known):
        raise InputError(
            f"setting {unknown[0]!r} is unknown to {objective}: choose from {', '.join(sorted(known - {'objective'}))}"
        )
    return TrainConfig(**(values | {"objective": objective}))


def recipe_names() -> list[str]:
    """All published recipes, which are YAML in the package: what was trained how, and who says so."""
    folder = resources.files(__package__) / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str, command: str) -> tuple[str, dict[str, Any]]:
    """Objective and settings of a recipe; InputError when there is none of that name, or it is for another command."""
    import yaml

    if name not in recipe_names():
        raise InputError(f"recipe {name!r} is unknown: choose one of {', '.join(recipe_names())}")
    found = yaml.safe_load((resources.files(__package__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    objective: str = found["objective"]
    if (own := OBJECTIVES[objective].command) != command:
        raise InputError(f"recipe {name!r} is for sdkd {own}, not for sdkd {command}: use that command")
    settings: dict[str, Any] = found["settings"]
    return objective, settings
