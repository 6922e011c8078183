"""Block-removed students of a UNet: their configs, and where their weights come from, by the data of their family.

The student's config is derived from the teacher's and the student is constructed from it, so `config.json` is right by
construction; its weights are clones of the teacher's, so training the student never trains the teacher.
What each student keeps, with its source: the modules of sdkd.families.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sdkd.errors import InputError, ModelError
from sdkd.families import STUDENTS, StudentSpec, family_named, family_of_unet
from sdkd.students.layout import depth_entries, depths, kept_blocks, layer_map

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

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
_TIME_IDS = 6  # numbers that SDXL's UNets take beside the text: sizes of the original and of the crop, its corner


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
    return {key: _tuples(value) for key, value in (defaults | known).items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def check_teacher(config: Mapping[str, Any], student: str | StudentSpec | None = None) -> None:
    """ModelError unless `config` is that of a complete UNet of a family: says what was expected and found.

    With a student also unless that is one of this family's, and the attentions are as deep as it needs.
    """
    found, family = full_config(config), family_of_unet(config)
    spec = None if student is None else student_spec(student)
    if spec is not None and spec.family != family.name:
        own = ", ".join(one.short for one in family.students)
        raise ModelError(
            f"{spec.name} is a student of {family_named(spec.family).title}, and this UNet is one of {family.title}, "
            f"whose students are {own}"
        )
    wrong = [key for key, expected in family.teacher.items() if not _agrees(found[key], expected)]
    levels = len(family.teacher["down_block_types"])
    per_level = [key for key in _PER_LEVEL if isinstance(found[key], tuple) and len(found[key]) != levels]
    problems = [f"{key}: expected {_text(family.teacher[key])}, found {_text(found[key])}" for key in wrong]
    problems += [f"{key}: expected {levels} levels, found {len(found[key])}" for key in per_level if key not in wrong]
    if problems:
        raise ModelError(
            f"the teacher's UNet is not a complete UNet of {family.title}{_guess(found)}. "
            f"{'; '.join(problems)}. Give the folder or hub id of a pipeline of {family.title}"
        )
    if spec is not None:
        _check_depths(spec, depths(found))


def _check_depths(spec: StudentSpec, there: Mapping[str, int]) -> None:
    kept, layers = kept_blocks(spec), layer_map(spec)
    for own, blocks in kept.items():
        needed, name = max(blocks) + 1, layers[own]
        if needed > there[name]:
            raise ModelError(
                f"{spec.name} is made from {needed} transformer blocks of {name}, and this teacher has {there[name]} "
                f"there: give a teacher that is as deep as {family_named(spec.family).title}"
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
    if _agrees(found["layers_per_block"], 1) or student_names(found):
        return " (it looks like a student already; a student is made from its teacher)"
    return ""


def student_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The students that a UNet config, as in config.json, has the blocks of: one layout may have several names.

    Empty for a complete UNet and for other shapes.
    """
    family = family_of_unet(config)
    keys = ("down_block_types", "up_block_types", "mid_block_type", "layers_per_block")
    found = {**config, **{key: _tuples(config.get(key, family.teacher[key])) for key in keys}}

    def fits(spec: StudentSpec) -> bool:
        down, up = (family.teacher[key] for key in keys[:2])
        blocks = [down[: len(down) - spec.dropped_levels], up[spec.dropped_levels :], spec.mid_block_type]
        if [found[key] for key in keys[:3]] != blocks or not _agrees(found[keys[3]], len(spec.down_layers)):
            return False
        return spec.transformers is None or depths(found) == {own: len(b) for own, b in kept_blocks(spec).items()}

    return tuple(spec.name for spec in family.students if fits(spec))


def recognised(config: Mapping[str, Any]) -> StudentSpec | None:
    """Which student's architecture a UNet config has (Segmind's name where two share it), None for a teacher's."""
    return next((STUDENTS[name] for name in student_names(config)), None)


def teacher_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a teacher that a student can be of: the student's own with all levels, layers, transformer blocks.

    Its widths below the student's are a guess (the last one again), and so are its depths (those of the family's first
    published model): for layer maps, not for building a teacher.
    """
    full, family = full_config(config), family_of_unet(config)
    published = next(iter(family.models.values())).unet
    levels = len(family.teacher["down_block_types"])
    for key in _PER_LEVEL:
        if isinstance(full[key], tuple):
            full[key] = (*full[key], *(full[key][-1],) * (levels - len(full[key])))
    given = "transformer_layers_per_block"
    return full | {given: published.get(given, full[given])} | dict(family.teacher)


def student_config(teacher_config: Mapping[str, Any], student: str | StudentSpec) -> dict[str, Any]:
    """The student's UNet config, complete, as a new dict; ModelError as `check_teacher` raises it."""
    spec = student_spec(student)
    check_teacher(teacher_config, spec)
    config = full_config(teacher_config)
    kept = len(config["block_out_channels"]) - spec.dropped_levels
    for key in _PER_LEVEL:
        if isinstance(config[key], tuple):
            config[key] = config[key][:kept]
    for key in _PER_UP_LEVEL:
        if isinstance(config[key], tuple):
            config[key] = config[key][spec.dropped_levels :]
    config |= {"layers_per_block": len(spec.down_layers), "mid_block_type": spec.mid_block_type}
    return config | depth_entries(spec)


def key_map(teacher_config: Mapping[str, Any], student: str | StudentSpec) -> dict[str, str]:
    """Module of the student -> module of the teacher that its weights come from, for every block it keeps.

    No module is inside another; of an attention that keeps some transformer blocks its parts are listed. Modules
    outside the blocks (conv_in, time_embedding, ...) have the same name in both and are not listed.
    """
    spec = student_spec(student)
    check_teacher(teacher_config, spec)
    there, kept = depths(full_config(teacher_config)), kept_blocks(spec)
    found = {}
    for own, of in layer_map(spec).items():
        blocks = kept.get(own)
        if blocks is None or blocks == tuple(range(there[of])):
            found[own] = of
        else:
            found |= {f"{own}.{part}": f"{of}.{part}" for part in ("norm", "proj_in", "proj_out")}
            part = "transformer_blocks"
            found |= {f"{own}.{part}.{index}": f"{of}.{part}.{source}" for index, source in enumerate(blocks)}
    return found


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

    Raises ModelError as `check_teacher` does, and when the teacher holds adapters (fuse or unload a LoRA first).
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
        unet(sample, torch.ones(batch), encoder_hidden_states=text, added_cond_kwargs=_added(full, batch))
    return int(counter.get_total_flops()) // 2


def _added(config: Mapping[str, Any], batch: int) -> dict[str, Any] | None:
    """What a UNet of SDXL takes beside the text, as `added_cond_kwargs`."""
    import torch

    if config["addition_embed_type"] != "text_time":
        return None
    width = config["projection_class_embeddings_input_dim"] - _TIME_IDS * config["addition_time_embed_dim"]
    return {"text_embeds": torch.empty(batch, width), "time_ids": torch.empty(batch, _TIME_IDS)}
