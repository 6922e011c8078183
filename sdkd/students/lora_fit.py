"""Which model a LoRA is for, by the names and shapes of all its layers: a UNet itself, or the teacher of a student."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sdkd.errors import ModelError
from sdkd.families import MODELS, StudentSpec
from sdkd.students.blocks import key_map, student_spec, teacher_key, unet_shapes
from sdkd.students.lora_layers import PARTS, Layer, common_name, flat, other_kind, peft_state, text_width, widths

if TYPE_CHECKING:
    import torch

Owner = Literal["model", "teacher"]
# Published models by the width of their text embeddings: "sd15", "sd21, sd21base", "sdxl".
_OWNERS = {
    width: ", ".join(name for name, (_, model) in MODELS.items() if model.unet["cross_attention_dim"] == width)
    for width in {model.unet["cross_attention_dim"] for _, model in MODELS.values()}
}
_IN_BLOCK = re.compile(r"^.*\.(attentions|resnets|downsamplers|upsamplers|transformer_blocks)\.\d+\.")

_LORA_BLOCKS = tuple(
    f"{style}{block}" for style in ("unet.", "lora_unet_") for block in ("down_blocks", "mid_block", "up_blocks")
)
_LORA_UNET, _LORA_TEXT = ("unet.", "lora_unet_"), (*(f"{part}." for part in PARTS[1:]), "lora_te")


@dataclass(frozen=True)
class Target:
    """The layers of a UNet that a LoRA can change: dotted name and shape by flat name; None where it is not known."""

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...] | None]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Target:
        """All linear layers and convolutions of a UNet of this config."""
        shapes = unet_shapes(config).items()
        found = {name.removesuffix(".weight"): shape for name, shape in shapes if len(shape) in (2, 4)}
        return cls({flat(name): name for name in found}, {flat(name): shape for name, shape in found.items()})

    def unknown(self, layers: Mapping[str, Layer]) -> list[str]:
        """Layers of a LoRA that are not here."""
        return [module for module in layers if module not in self.names]

    def unequal(self, layers: Mapping[str, Layer]) -> list[str]:
        """Layers of a LoRA that are here in another shape."""
        shapes = {module: self.shapes.get(module) for module in layers}
        return [module for module, shape in shapes.items() if shape and widths(shape) != layers[module].widths]

    def state(self, layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
        """Layers that fit, under PEFT's names: in the shapes of a linear layer or a convolution, as each one is."""
        kinds = {module: len(self.shapes.get(module) or layer.down.shape) for module, layer in layers.items()}
        return peft_state("unet", {name: layer.shaped(kinds[name]) for name, layer in layers.items()}, self.names)

    def fits(self, layers: Mapping[str, Layer]) -> bool:
        """Whether all layers are here, in their shapes."""
        return not self.unknown(layers) and not self.unequal(layers)

    def tells(self, layers: Mapping[str, Layer], other: Target) -> bool:
        """Whether a LoRA changes all layers of a kind here, as training does, where `other` has more of that kind."""
        mine, theirs = _by_kind(self.names), _by_kind(other.names)
        return any(
            mine[kind] <= layers.keys() and not theirs[kind] <= self.names.keys() for kind in mine if kind in theirs
        )


def _by_kind(names: Mapping[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, name in names.items():
        found.setdefault(_kind(name), set()).add(module)
    return found


def _kind(name: str) -> str:
    return _IN_BLOCK.sub("", name)


@dataclass(frozen=True)
class Fit:
    """A LoRA's UNet weights for one model, under PEFT's names, and whose they were, with the reason in words."""

    state: Mapping[str, torch.Tensor]
    owner: Owner
    why: str
    sure: bool = True


def check_text_width(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], what: str) -> None:
    """ModelError, naming both widths, for a LoRA of a model with other text embeddings, and whose they are."""
    theirs, ours = text_width(state), config.get("cross_attention_dim")
    if theirs is not None and isinstance(ours, int) and theirs != ours:
        names = [f"{width} ({_OWNERS[width]})" if width in _OWNERS else str(width) for width in (theirs, ours)]
        raise ModelError(
            f"{what} is for text embeddings {names[0]} wide, this model's are {names[1]} wide: give a LoRA that was "
            "made for this model or its teacher"
        )


def fit_model(layers: Mapping[str, Layer], config: Mapping[str, Any], what: str) -> Fit:
    """A LoRA for the UNet of this config itself; ModelError when it names other layers, or has other widths."""
    own = Target.of(config)
    _refuse_misfit(layers, own, what, "this UNet lacks")
    return Fit(own.state(layers), "model", "all its layers are this UNet's")


def fit_student(
    layers: Mapping[str, Layer],
    config: Mapping[str, Any],
    teacher_config: Mapping[str, Any],
    spec: StudentSpec,
    what: str,
    *,
    unclear: Owner,
    whole_teacher: bool = False,
) -> Fit:
    """A LoRA for a student's UNet: its own as it is, its teacher's by the layer map.

    All names and shapes decide. Where they fit both, a LoRA that changes all layers of a kind in the student, and none
    that was removed, is the student's: one of the teacher would change those, too. What is left, `unclear` decides.
    `whole_teacher`: that the widths of removed layers are known. ModelError when it fits neither.
    """
    modules = key_map(teacher_config, spec)
    own, teacher = Target.of(config), _teacher(teacher_config, modules, whole_teacher)
    fits_own, fits_teacher = own.fits(layers), teacher.fits(layers)
    if not fits_own and not fits_teacher:
        nearer = own if len(own.unknown(layers)) < len(teacher.unknown(layers)) else teacher
        _refuse_misfit(layers, nearer, what, f"{spec.name} and its teacher lack", own if nearer is teacher else teacher)
    if not fits_own:
        return _of_teacher(layers, teacher, teacher_config, spec, f"not all its layers are {spec.name}'s")
    mine = Fit(own.state(layers), "model", f"all its layers are {spec.name}'s")
    same = all(teacher_key(own.names[module], modules) == own.names[module] for module in layers)
    if not fits_teacher or same or own.tells(layers, teacher):
        return mine
    rule = f"its layers are {spec.name}'s and its teacher's at other places, and not all of {spec.name}'s"
    if unclear == "model":
        return Fit(mine.state, "model", rule, sure=False)
    return _of_teacher(layers, teacher, teacher_config, spec, rule, sure=False)


def _teacher(config: Mapping[str, Any], modules: Mapping[str, str], whole: bool) -> Target:
    found = Target.of(config)
    edges = ("conv_", "time_embedding_", "add_embedding_")
    kept = (*(f"{flat(module)}_" for module in modules.values()), *edges)
    shapes = {name: shape if whole or f"{name}_".startswith(kept) else None for name, shape in found.shapes.items()}
    return Target(found.names, shapes)


def _of_teacher(layers: Mapping[str, Layer], teacher: Target, config: Mapping[str, Any], spec: StudentSpec, why: str,
                sure: bool = True) -> Fit:  # fmt: skip
    state = remap_lora(teacher.state(layers), config, spec)
    return Fit(state, "teacher", why, sure)


def _refuse_misfit(
    layers: Mapping[str, Layer], target: Target, what: str, lacks: str, other: Target | None = None
) -> None:
    """ModelError naming the first layer that is not there, or both shapes of the first that has another."""
    unknown = target.unknown(layers)
    if unknown:
        unknown = [module for module in unknown if other is None or module not in other.names] or unknown
        raise ModelError(
            f"{what} names {len(unknown)} layers of {len(layers)} that {lacks} (first: {layers[unknown[0]].name!r}): "
            "give a LoRA that was made for this model or its teacher"
        )
    for module in target.unequal(layers):
        shape = target.shapes[module] or ()
        raise ModelError(
            f"{what} is for a model of other widths: {layers[module].name!r} is for a layer of "
            f"{_size(layers[module].widths)}, {target.names[module]} is one of {_size(widths(shape))}. "
            "Give a LoRA that was made for this model or its teacher"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def remap_lora(
    state_dict: Mapping[str, torch.Tensor], teacher_config: Mapping[str, Any], student: str | StudentSpec
) -> dict[str, torch.Tensor]:
    """A LoRA of the teacher as a LoRA of its student: weights of kept layers renamed, those of removed layers left out.

    Takes diffusers' and PEFT's names (`unet.down_blocks.0...`, `base_model.model.down_blocks.0...`) and kohya's
    (`lora_unet_down_blocks_0_...`, of SDXL `lora_unet_input_blocks_4_...`); weights of text encoders pass unchanged.
    Raises ModelError for adapters of another kind (DoRA, LoHa, ...), and when no name belongs to a layer that the
    student keeps.
    """
    if kind := other_kind(state_dict):
        raise ModelError(f"this file of adapters {kind}")
    modules = key_map(teacher_config, student)
    places: dict[str, str] = {}
    for own, teacher in modules.items():
        ends = (("unet.", own, teacher, "."), *(("lora_unet_", flat(own), flat(teacher), end) for end in "_."))
        places |= {f"{style}{of}{end}": f"{style}{to}{end}" for style, to, of, end in ends}
    result: dict[str, torch.Tensor] = {}
    moved = text = 0
    for key, value in ((common_name(key), value) for key, value in state_dict.items()):
        prefix = next((prefix for prefix in places if key.startswith(prefix)), None)
        if prefix is not None:
            result[places[prefix] + key.removeprefix(prefix)] = value
            moved += 1
        elif not key.startswith(_LORA_BLOCKS):
            result[key] = value
            moved += key.startswith(_LORA_UNET)
            text += key.startswith(_LORA_TEXT)
    if not moved and not 0 < text == len(state_dict):  # nothing of the UNet is left, and there was something
        raise ModelError(
            f"the LoRA names no layer that {student_spec(student).name} keeps (its first name is "
            f"{next(iter(state_dict), 'none')!r}): give a LoRA of its teacher, in diffusers' or kohya's names"
        )
    return result
