"""Block-removed students of a Stable Diffusion 1.x/2.x UNet, as data: what is kept, and where its weights come from.

The student's config is derived from the teacher's and the student is constructed from it, so `config.json` is right by
construction; its weights are clones of the teacher's, so training the student never trains the teacher.
Layer choice: BK-SDM (Kim et al. 2023, arXiv 2305.15798); Segmind's sd-small and sd-tiny remove the same blocks.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sdkd.errors import InputError, ModelError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
MID = "UNetMidBlock2DCrossAttn"


class LossWeights(NamedTuple):
    """Factors of the three losses: task, output KD, feature KD (the sum over all feature pairs)."""

    task: float
    output: float
    feature: float


@dataclass(frozen=True)
class StudentSpec:
    """One student: what it keeps of a teacher with 4 levels and 2 layers per block, and how it is usually trained."""

    name: str
    short: str
    keeps_mid_block: bool
    dropped_levels: int  # deepest levels removed, down and up
    pairs: str  # preset of feature pairs, see sdkd.distill.training.pairs
    weights: LossWeights
    down_layers: tuple[int, ...] = (0,)
    # The last resnet of an up block takes the skip of the next finer level, so it cannot be the one that goes.
    up_layers: tuple[int, ...] = (0, 2)


_SEGMIND, _BK = LossWeights(1.0, 0.5, 0.5), LossWeights(1.0, 1.0, 1.0)
STUDENTS: dict[str, StudentSpec] = {
    spec.name: spec
    for spec in (
        StudentSpec("sd-small", "small", True, 0, "segmind", _SEGMIND),
        StudentSpec("sd-tiny", "tiny", False, 1, "segmind", _SEGMIND),
        StudentSpec("bk-base", "bk-base", True, 0, "bk-sdm", _BK),
        StudentSpec("bk-small", "bk-small", False, 0, "bk-sdm", _BK),
        StudentSpec("bk-tiny", "bk-tiny", False, 1, "bk-sdm", _BK),
    )
}

# What a teacher's config must say: these are the UNets of SD 1.x and 2.x, inpainting included.
TEACHER_CONFIG: dict[str, Any] = {
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "mid_block_type": MID,
    "layers_per_block": 2,
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
}
# Config entries that may hold one value per level: finest level first, or (up) deepest level first.
_PER_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "only_cross_attention",
    "cross_attention_dim",
    "transformer_layers_per_block",
)
_PER_UP_LEVEL = ("up_block_types", "reverse_transformer_layers_per_block")
# Where a LoRA's names begin for layers inside the UNet's blocks: diffusers' style and kohya's.


def student_spec(name: str | StudentSpec) -> StudentSpec:
    """The spec of a full or short name; InputError lists the names."""
    if isinstance(name, StudentSpec):
        return name
    for spec in STUDENTS.values():
        if name.lower().replace("_", "-") in (spec.name, spec.short):
            return spec
    every = STUDENTS.values()
    names = ", ".join(spec.name if spec.short == spec.name else f"{spec.short} ({spec.name})" for spec in every)
    raise InputError(f"student {name!r} is unknown: choose one of {names}")


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet config as a plain dict: defaults filled in, lists as tuples, diffusers' private entries left out.

    Without the private `_use_default_values`, whose presence makes `from_config` ignore changed entries.
    """
    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    known = {key: value for key, value in config.items() if key in defaults}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in (defaults | known).items()}


def check_teacher(config: Mapping[str, Any]) -> None:
    """ModelError unless `config` is that of a complete SD 1.x/2.x-shaped UNet: says what was expected and found."""
    found = full_config(config)
    wrong = [key for key, expected in TEACHER_CONFIG.items() if not _agrees(found[key], expected)]
    levels = len(TEACHER_CONFIG["down_block_types"])
    per_level = [key for key in _PER_LEVEL if isinstance(found[key], tuple) and len(found[key]) != levels]
    problems = [f"{key}: expected {_text(TEACHER_CONFIG[key])}, found {_text(found[key])}" for key in wrong]
    problems += [f"{key}: expected {levels} levels, found {len(found[key])}" for key in per_level if key not in wrong]
    if problems:
        raise ModelError(
            f"the teacher's UNet is not a complete Stable Diffusion 1.x/2.x UNet{_guess(found)}. "
            f"{'; '.join(problems)}. Give the folder or hub id of an SD 1.x/2.x pipeline"
        )


def _agrees(found: object, expected: object) -> bool:
    if isinstance(found, tuple) and isinstance(expected, int):
        return all(value == expected for value in found)
    return bool(found == expected)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} x [{', '.join(str(part) for part in value)}]"
    return str(value)


def _guess(found: Mapping[str, Any]) -> str:
    """What the UNet probably is, for the message."""
    if found["addition_embed_type"] == "text_time":
        return " (it looks like SDXL, which has another layout)"
    if _agrees(found["layers_per_block"], 1):
        return " (it looks like a student already; a student is made from its teacher)"
    return ""


def student_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The students that a UNet config, as in config.json, has the blocks of: one layout may have several names.

    Empty for a complete UNet and for other shapes.
    """
    keys = ("down_block_types", "up_block_types", "mid_block_type", "layers_per_block")
    found = [tuple(value) if isinstance(value := config.get(key, TEACHER_CONFIG[key]), list) else value for key in keys]
    down, up, mid = (TEACHER_CONFIG[key] for key in keys[:3])

    def fits(spec: StudentSpec) -> bool:
        levels, kept = spec.dropped_levels, mid if spec.keeps_mid_block else None
        blocks = [down[: len(down) - levels], up[levels:], kept]
        return found[:3] == blocks and _agrees(found[3], len(spec.down_layers))

    return tuple(name for name, spec in STUDENTS.items() if fits(spec))


def recognised(config: Mapping[str, Any]) -> StudentSpec | None:
    """Which student's architecture a UNet config has (Segmind's name where two share it), None for a teacher's."""
    return next((STUDENTS[name] for name in student_names(config)), None)


def teacher_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a teacher that a student can be of: the student's own with all levels and layers.

    Its widths below the student's are a guess (the last one again): for layer maps, not for building a teacher.
    """
    full = full_config(config)
    levels = len(TEACHER_CONFIG["down_block_types"])
    for key in _PER_LEVEL:
        if isinstance(full[key], tuple):
            full[key] = (*full[key], *(full[key][-1],) * (levels - len(full[key])))
    return full | TEACHER_CONFIG


def student_config(teacher_config: Mapping[str, Any], student: str | StudentSpec) -> dict[str, Any]:
    """The student's UNet config, complete, as a new dict; ModelError when the teacher is not SD-shaped."""
    spec = student_spec(student)
    check_teacher(teacher_config)
    config = full_config(teacher_config)
    kept = len(config["block_out_channels"]) - spec.dropped_levels
    for key in _PER_LEVEL:
        if isinstance(config[key], tuple):
            config[key] = config[key][:kept]
    for key in _PER_UP_LEVEL:
        if isinstance(config[key], tuple):
            config[key] = config[key][spec.dropped_levels :]
    config["layers_per_block"] = len(spec.down_layers)
    if not spec.keeps_mid_block:
        config["mid_block_type"] = None
    return config


def key_map(teacher_config: Mapping[str, Any], student: str | StudentSpec) -> dict[str, str]:
    """Module of the student -> module of the teacher that its weights come from, for every block it keeps.

    Modules outside the blocks (conv_in, time_embedding, ...) have the same name in both and are not listed.
    """
    spec = student_spec(student)
    check_teacher(teacher_config)
    return dict(_pairs(len(full_config(teacher_config)["block_out_channels"]), spec))


def _pairs(levels: int, spec: StudentSpec) -> Iterator[tuple[str, str]]:
    kept, dropped = levels - spec.dropped_levels, spec.dropped_levels
    for level in range(kept):
        parts = ("resnets",) if level == levels - 1 else ("resnets", "attentions")
        for index, source in enumerate(spec.down_layers):
            for part in parts:
                yield f"down_blocks.{level}.{part}.{index}", f"down_blocks.{level}.{part}.{source}"
        if level < kept - 1:
            yield f"down_blocks.{level}.downsamplers.0", f"down_blocks.{level}.downsamplers.0"
    if spec.keeps_mid_block:
        yield "mid_block", "mid_block"
    for block in range(kept):
        teacher_block = block + dropped
        parts = ("resnets",) if teacher_block == 0 else ("resnets", "attentions")
        for index, source in enumerate(spec.up_layers):
            for part in parts:
                yield f"up_blocks.{block}.{part}.{index}", f"up_blocks.{teacher_block}.{part}.{source}"
        if block < kept - 1:
            yield f"up_blocks.{block}.upsamplers.0", f"up_blocks.{teacher_block}.upsamplers.0"


def teacher_key(key: str, modules: Mapping[str, str]) -> str:
    """Name in the teacher of a student's weight, by a map of `key_map`; a name outside the map stays."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in modules:
            return ".".join([modules[prefix], *parts[length:]])
    return key


def build_student(teacher: UNet2DConditionModel, student: str | StudentSpec) -> UNet2DConditionModel:
    """A new UNet with cloned weights of the teacher, on its device, in its dtype, in eval mode, trainable.

    Raises ModelError when the teacher is not SD-shaped, or holds adapters (fuse or unload a LoRA first).
    """
    modules = key_map(teacher.config, student)
    result = meta_unet(student_config(teacher.config, student))
    source = teacher.state_dict()
    names = {key: teacher_key(key, modules) for key in result.state_dict()}
    if missing := [name for name in names.values() if name not in source]:
        raise ModelError(
            f"the teacher's UNet has no weight {missing[0]!r} (nor {len(missing) - 1} others): "
            "if it carries a LoRA, fuse or unload it first"
        )
    result.load_state_dict({key: source[name].detach().clone() for key, name in names.items()}, assign=True)
    return result.requires_grad_(True).eval()


def copy_unet(unet: UNet2DConditionModel, **changes: Any) -> UNet2DConditionModel:
    """A UNet of its own with another's weights, in eval mode, trainable; `changes` are of its config.

    Weights that they bring are 0: a projection that is new adds nothing at first.
    """
    import torch

    result, source = meta_unet({**unet.config, **changes}), unet.state_dict()
    shapes = {key: value.shape for key, value in result.state_dict().items() if key not in source}
    state = {key: torch.zeros(shape).to(unet.conv_in.weight) for key, shape in shapes.items()}
    result.load_state_dict(state | {key: value.detach().clone() for key, value in source.items()}, assign=True)
    return result.requires_grad_(True).eval()


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of `config` on the meta device: shapes without memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), no_init():
        return UNet2DConditionModel(**full_config(config))


def no_init() -> AbstractContextManager[Any]:
    """Inside, initialisers of new modules do nothing: on the meta device that is all they do, and it takes most of the
    time.
    """
    from torch.overrides import TorchFunctionMode

    class NoInit(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else given["tensor"]
            return func(*args, **given)

    return NoInit()


def unet_shapes(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of a UNet config, by name."""
    return _shapes(json.dumps(full_config(config), sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _shapes(config: str) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in meta_unet(json.loads(config)).named_parameters()}


def count_parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of a UNet config."""
    return sum(map(math.prod, unet_shapes(config).values()))


def count_macs(
    config: Mapping[str, Any],
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    sequence: int = 77,
) -> int:
    """Multiply-accumulate operations of one forward pass of a UNet config, counted on the meta device.

    `height` and `width` are in latents (default: the config's sample_size, else 64), `sequence` in tokens.
    Convolutions, linear layers and attention's two products count, element-wise work does not (FlopCounterMode / 2).
    """
    import torch
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    full = full_config(config)
    size = full["sample_size"] or 64
    default = (size, size) if isinstance(size, int) else tuple(size)
    unet = meta_unet(full)
    unet.set_attn_processor(AttnProcessor())  # plain products, which the counter knows on every device and version
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        sample = torch.empty(batch, full["in_channels"], height or default[0], width or default[1])
        text = torch.empty(batch, sequence, full["cross_attention_dim"])
        unet(sample, torch.ones(batch), encoder_hidden_states=text)
    return int(counter.get_total_flops()) // 2
