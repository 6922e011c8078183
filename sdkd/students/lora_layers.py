"""A LoRA file as what it is: for each layer a down and an up matrix and a scale, whatever style its names have.

Names are brought to the two styles that diffusers and the layer map know: `unet.<module>.<weight>` (diffusers, PEFT)
and `lora_unet_<module with underscores>.<weight>` (kohya), which those of the original code become: kohya's LoRAs of
SDXL have them. Adapters of other kinds, whose files look like one, are known by their names.

Written back under PEFT's names with the scale inside the matrices, it means the same to every reader: diffusers
leaves out the alphas of some of kohya's layers where they differ from layer to layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdkd.errors import ModelError, an
from sdkd.families import FAMILIES
from sdkd.students.original_names import diffusers_name

if TYPE_CHECKING:
    import torch

# The parts of a pipeline that a LoRA may change, by what their layers begin with in kohya's names.
_KOHYA_PARTS = {"lora_unet_": "unet"} | {
    encoder.lora: encoder.part for family in FAMILIES for encoder in family.text_encoders
}
PARTS = tuple(dict.fromkeys(_KOHYA_PARTS.values()))
_KOHYA = re.compile(
    rf"(?P<part>{'|'.join(_KOHYA_PARTS)})(?P<module>[^.]+)\.(?P<role>lora_down\.weight|lora_up\.weight|alpha)"
)
_DOTTED = re.compile(
    rf"(?P<part>{'|'.join(PARTS)})\.(?P<module>.+)\.(?P<role>(lora|lora_linear_layer)\.(up|down)\.weight"
    r"|lora_(A|B|up|down)\.weight|alpha)"
)
_UP = re.compile(r"lora_B|\bup\b|lora_up")
_TEXT_ROOT = re.compile(r"^(base_model\.model\.)?(?=(text_model\.)?encoder\.layers\.)")
_OLD_TEXT = re.compile(r"\.to_(q|k|v|out)_lora\.")
_TEXT_LAYER = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc[12])")
# Settings of PEFT that make another kind of adapter, and their values in a plain LoRA.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None), "use_dora": (False, None), "lora_bias": (False, None), "bias": ("none", None),
    "modules_to_save": (None, []), "target_parameters": (None, []), "use_qalora": (False, None),
    "layer_replication": (None, []), "trainable_token_indices": (None, [], {}), "fan_in_fan_out": (False, None),
}  # fmt: skip
_TEXT_WIDTH = re.compile(r"attn2[._](processor\.)?to_[kv](\.lora_A|\.lora_down|\.lora\.down|_lora\.down)\.weight$")
_WRAPPERS = ("base_model.model.unet.", "base_model.model.", "unet.")  # of PEFT's own files, the longest first
_UNET_PARTS = (
    *("down_blocks.", "mid_block.", "up_blocks."),
    *("conv_in.", "conv_out.", "time_embedding.", "add_embedding."),
)
# Old diffusers kept a LoRA in attention processors: ...attn1.processor.to_q_lora.down.weight
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")
# Adapters that a down and an up matrix do not describe, by what the names of their weights hold.
_OTHERS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"(^|[._])b?oft_",
    # IA3, GLoRA, VeRA, AdaLoRA, Tucker decomposition, trained scalars, biases, embedding layers, differences of
    # weights, textual inversions, Control-LoRA.
    "adapter of another kind": r"ia3_|\.on_input$|\.[ab][12]\.weight$|vera_lambda_|\.lora_E$|ranknum|\.lora_mid\."
    r"|\.scalar$|lora[\w.]*\.bias$|lora_embedding_[AB]|\.diff(_b)?$|\.[wb]_norm$|^bundle_emb\.|^lora_controlnet$",
}


@dataclass(frozen=True)
class Layer:
    """One layer's part of a LoRA: it adds `scale * up @ down` to the layer's weight."""

    down: torch.Tensor  # [rank, inputs] or [rank, inputs, height, width]
    up: torch.Tensor  # [outputs, rank] or [outputs, rank, 1, 1]
    scale: float  # alpha / rank: 1 where the file says no alpha
    name: str  # of the down matrix in the file, for messages

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs, inputs and kernel of the layer that it is for, without kernels of 1."""
        return widths((self.up.shape[0], *self.down.shape[1:]))

    def shaped(self, ndim: int) -> Layer:
        """The same for a linear layer (2 dimensions) or for a convolution (4): with a kernel of 1 they are one."""
        if self.down.ndim == self.up.ndim == ndim:
            return self
        kernel = (1,) * (ndim - 2)
        down = self.down if self.down.ndim == ndim else self.down.reshape(*self.down.shape[:2], *kernel)
        return replace(self, down=down, up=self.up.reshape(*self.up.shape[:2], *kernel))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Down and up with the scale inside: exactly, a power of two in their own dtype, all else in float32."""
        if self.scale == 1:
            return self.down, self.up
        down, up = self.scale, 1.0
        while 0 < 2 * down < up:  # shared out, so that float16 has room
            down, up = 2 * down, up / 2
        whole = abs(math.frexp(self.scale)[0]) in (0.0, 0.5)
        parts = self.down.float() * down, self.up.float() * up
        return (parts[0].to(self.down.dtype), parts[1].to(self.up.dtype)) if whole else parts


def widths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape; a convolution with a kernel of 1 is a linear layer."""
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def flat(module: str) -> str:
    """A module's name as kohya writes it."""
    return module.replace(".", "_")


def other_kind(names: Iterable[str]) -> str | None:
    """What a file of adapters is when it is no plain LoRA, for an error: "is a DoRA (...): ..."; None for a LoRA.

    To be asked of the names as the file has them: diffusers leaves out what it does not know.
    """
    names = list(names)
    found = {kind: name for kind, pattern in _OTHERS.items() for name in reversed(names) if re.search(pattern, name)}
    if not found:
        return None
    first = next(iter(found.values()))
    return (
        f"is {an(' and '.join(found))} (by {first!r}): only plain LoRA is taken, an up and a down matrix and alpha for "
        "each layer. Merge it into its model with the program that made it, and give that model"
    )


def common_name(key: str) -> str:
    """A weight's name in diffusers' or kohya's style; a text encoder's stays as it is, and so does an unknown one."""
    if key.startswith("lora_unet_"):
        module, dot, role = key.removeprefix("lora_unet_").partition(".")
        return f"lora_unet_{diffusers_name(module) or module}{dot}{role}"
    for wrapper in _WRAPPERS:
        if key.startswith(wrapper) and key.removeprefix(wrapper).startswith(_UNET_PARTS):
            key = key.removeprefix(wrapper)
            break
    if not key.startswith(_UNET_PARTS):
        return key
    key = _PROCESSOR.sub(lambda found: f".to_{found[1]}{'.0' if found[1] == 'out' else ''}.lora.", key)
    # One style for all weights: of a file with both, diffusers would load those of the first alone.
    return "unet." + key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def read_layers(
    state: Mapping[str, torch.Tensor], what: str, settings: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Layer]]:
    """The layers of a LoRA by part (`unet`, `text_encoder`, `text_encoder_2`) and by flat name of the module.

    `what` begins the messages; `settings` (`unet.r`, `unet.lora_alpha`, ...) are those of the file, whose scales stay
    there. ModelError for adapters of another kind, for names that belong to no layer (nothing is left out), for halves
    of layers, and for values that are not finite.
    """
    if kind := other_kind(state) or _other_settings(settings or {}):
        raise ModelError(f"{what} {kind}")
    found: dict[str, dict[str, dict[str, tuple[str, torch.Tensor]]]] = {part: {} for part in PARTS}
    unknown = []
    for key, value in state.items():
        if (place := _place(key)) is None:
            unknown.append(key)
            continue
        part, module, role = place
        if role in found[part].setdefault(module, {}):
            raise ModelError(f"{what} has two {role} weights of one layer ({found[part][module][role][0]!r}, {key!r})")
        if role == "alpha" and any(name.startswith(f"{part}.") for name in settings or ()):
            raise ModelError(f"{what} states alpha twice, in {key!r} and in its settings: make it again")
        found[part][module][role] = (key, value)
    if unknown:
        raise ModelError(
            f"{what} has {len(unknown)} of {len(state)} weights whose names belong to no layer of a UNet or text "
            f"encoder (first: {unknown[0]!r}): give a LoRA in diffusers', PEFT's or kohya's names"
        )
    return {
        part: {module: _layer(given, what) for module, given in modules.items()}
        for part, modules in found.items()
        if modules
    }


def parts_of(names: Iterable[str]) -> tuple[str, ...]:
    """The parts of a pipeline whose layers a LoRA's weights are of, by their names."""
    found = {place[0] for name in names if (place := _place(name))}
    return tuple(part for part in PARTS if part in found)


def _other_settings(settings: Mapping[str, Any]) -> str | None:
    """What a file's settings say that weights alone do not: other kinds of adapters."""
    for name, value in settings.items():
        key = name.rpartition(".")[2]
        if key in _FOREIGN and value not in _FOREIGN[key]:
            return f"has the setting {name} = {value!r}, which engines and students do not take: make a plain LoRA"
    return None


def _place(key: str) -> tuple[str, str, str] | None:
    """Part, flat module and role (`down`, `up`, `alpha`) of a weight; None when its name says none."""
    name = _TEXT_ROOT.sub("text_encoder.", common_name(key))
    match = _KOHYA.fullmatch(name)
    if match is None:
        match = _DOTTED.fullmatch(_OLD_TEXT.sub(r".\1_proj.lora.", name))
    if match is None:
        return None
    role = "alpha" if match["role"] == "alpha" else "up" if _UP.search(match["role"]) else "down"
    module, part = flat(match["module"]), _KOHYA_PARTS.get(match["part"], match["part"])
    if part == "unet":
        return part, module, role
    text = _TEXT_LAYER.fullmatch(module)
    return None if text is None else (part, f"layers.{text[1]}.{text[2]}.{text[3]}", role)


def _layer(given: Mapping[str, tuple[str, torch.Tensor]], what: str) -> Layer:
    import torch

    name = next(iter(given.values()))[0]
    if not {"up", "down"} <= given.keys():
        lacking = "down" if "down" not in given else "up"
        raise ModelError(f"{what} has {name!r} without the {lacking} matrix of its layer: download or make it again")
    (name, down), (_, up) = ((key, _plain(tensor)) for key, tensor in (given["down"], given["up"]))
    alphas = given["alpha"][1].float() if "alpha" in given else torch.tensor(float(down.shape[0]))
    if alphas.numel() != 1 or not all(bool(torch.isfinite(tensor).all()) for tensor in (down, up, alphas)):
        raise ModelError(f"{what} has values that are no finite numbers, at {name!r}: download or make it again")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise ModelError(
            f"{what} has {name!r} of {list(down.shape)} beside an up matrix of {list(up.shape)}: their ranks do not "
            "agree. Download or make it again"
        )
    return Layer(down, up, float(alphas) / down.shape[0], name)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in a dtype that torch computes in: float8 and integers become float32."""
    import torch

    return tensor if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) else tensor.float()


def text_width(state: Mapping[str, torch.Tensor]) -> int | None:
    """How wide the text embeddings are that a LoRA's cross attention takes: 768 for SD 1.x, 1024 for 2.x, 2048 SDXL."""
    found = (value for name, value in state.items() if _TEXT_WIDTH.search(name) and value.ndim > 1)
    first = next(found, None)
    return None if first is None else int(first.shape[1])


def text_state(part: str, layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """Layers of a text encoder under PEFT's names, as `peft_state` gives them."""
    return peft_state(part, layers, {name: f"text_model.encoder.{name}" for name in layers})


def peft_state(part: str, layers: Mapping[str, Layer], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Layers under PEFT's names, their scales folded in; `names`: the dotted name of each flat one."""
    state = {}
    for module, layer in layers.items():
        down, up = layer.folded()
        state[f"{part}.{names[module]}.lora_A.weight"] = down.contiguous()
        state[f"{part}.{names[module]}.lora_B.weight"] = up.contiguous()
    return state


def peft_settings(state: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of PEFT for every part: those that are known, else those of weights whose scales are folded in.

    Without them some readers take one rank for all layers; with those of one part only, the other cannot be read.
    """
    settings = dict(known)
    for part in PARTS:
        if any(name.startswith(f"{part}.") for name in known):
            continue
        ups = [name for name in state if name.startswith(f"{part}.") and name.endswith(".lora_B.weight")]
        ranks = {_target(name): state[name].shape[1] for name in ups}
        if ranks:
            usual = max(ranks.values(), key=list(ranks.values()).count)
            others = {f"^{name}" if part == "unet" else name: rank for name, rank in ranks.items() if rank != usual}
            values = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": dict(others)}
            values |= {"target_modules": sorted(ranks)}
            settings |= {f"{part}.{key}": value for key, value in values.items()}
    return settings


def _target(name: str) -> str:
    """The `target_modules` for PEFT: a full name; of a text encoder one that fits with and without `text_model`."""
    part, _, rest = name.removesuffix(".lora_B.weight").partition(".")
    return rest if part == "unet" else rest.removeprefix("text_model.encoder.")


def remap_settings(settings: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a LoRA file (`unet.r`, `unet.rank_pattern`, ...) for a student.

    `modules` maps names of the student's modules to the teacher's; per-module entries follow it, those of removed
    modules are left out.
    """
    found = dict(settings)
    if "unet.lora_dropout" in found:
        found["unet.lora_dropout"] = 0.0  # it would stay switched on in diffusers
    for name in ("unet.rank_pattern", "unet.alpha_pattern"):
        if isinstance(found.get(name), Mapping):
            found[name] = {new: value for key, value in found[name].items() for new in _places(key, modules)}
    for name in ("unet.target_modules", "unet.exclude_modules"):
        if isinstance(found.get(name), list):
            found[name] = sorted({new for key in found[name] for new in _places(key, modules)})
    return found


def _places(key: str, modules: Mapping[str, str]) -> list[str]:
    """Where a module's entry goes: full names follow the map, short ones such as `to_q` stay."""
    bare = key.removeprefix("^")
    if not bare.startswith(_UNET_PARTS[:3]):
        return [key]
    mark = key[: len(key) - len(bare)]
    return [mark + own + bare.removeprefix(of) for own, of in modules.items() if f"{bare}.".startswith(f"{of}.")]
