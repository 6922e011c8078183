"""Any model as one .safetensors file with the original code's names, which other programs open.

Such a file has no place for configs: its readers take them for those of a published model, but for the blocks of the
UNet. So what would not read as the same model is refused by name. One part is in memory at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.console import Progress, quiet
from sdkd.core.contract import torch_dtype
from sdkd.core.files import check_file_free, written
from sdkd.core.marks import CHECKPOINT_MARK, is_written_checkpoint
from sdkd.core.outputs import Input
from sdkd.errors import InputError, ModelError, an
from sdkd.families import MODELS, Family, PublishedModel, family_of_unet
from sdkd.models.exportable import module_config
from sdkd.models.families import empty, part_classes, part_config
from sdkd.models.fused import loras_of
from sdkd.models.generation import entry
from sdkd.models.ldm_names import Layout, Place
from sdkd.models.resolve import load_component, load_rest
from sdkd.models.single_file import ABOUT, V, models_of, named, places_of, unet_config
from sdkd.models.source import ModelSource
from sdkd.students.blocks import full_config

if TYPE_CHECKING:
    import torch

_STORED = {"fp32": "F32", "fp16": "F16"}
_SPEC = "modelspec."
# Entries of configs that change no result, or that sdkd's reader finds otherwise.
_OPEN = {"sample_size", "upcast_attention", "force_upcast", "dropout", "attention_dropout", "projection_dim"}
_LAYOUT = {
    "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "transformer_layers_per_block",
    "reverse_transformer_layers_per_block", "mid_block_type", "num_attention_heads",
}  # fmt: skip
# Of a scheduler's config: the noise that a UNet was trained with.
_NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr", "trained_betas")
# modelspec's names of architectures, by the name of the published model; and of the code that a family is from.
_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1", "sd21": "stable-diffusion-v2-768-v", "sd21base": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}  # fmt: skip
_CODE = {
    "sd": "https://github.com/CompVis/stable-diffusion",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}
_TEXT = (
    "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
_ADVICE = "keep it as a diffusers folder"


@dataclass(frozen=True)
class Part:
    """One part: where its weights go, and the shape of each in diffusers, by diffusers' names."""

    name: str
    places: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def rows(self) -> dict[str, list[str]]:
        """The weights of each tensor of the file, in the order of their rows."""
        found: dict[str, list[str]] = {}
        for own, place in sorted(self.places.items(), key=lambda row: (row[1].name, row[1].third or 0)):
            found.setdefault(place.name, []).append(own)
        return found

    def shape(self, owns: list[str]) -> tuple[int, ...]:
        """The shape of a tensor of the file that is made of these weights."""
        place, (rows, *others) = self.places[owns[0]], self.shapes[owns[0]]
        shape = (rows * len(owns), *others)
        return shape[::-1] if place.transposed else (*shape, 1, 1) if place.pixel else shape

    def tensor(self, owns: list[str], state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """That tensor."""
        import torch

        tensor = torch.cat([state[own] for own in owns]) if len(owns) > 1 else state[owns[0]]
        return (tensor.T if self.places[owns[0]].transposed else tensor).reshape(self.shape(owns)).contiguous()


@dataclass(frozen=True)
class Plan:
    """What is written: parts, empty tensors that say something by their names, metadata, and what a user is told."""

    parts: tuple[Part, ...]
    marks: tuple[str, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]


def write_single_file(
    source: ModelSource,
    path: Path,
    *,
    precision: str = "fp16",
    spaced: bool = False,
    overwrite: bool = False,
    inputs: tuple[Input, ...] = (),
    progress: Progress = quiet,
) -> Plan:
    """Write a model as one .safetensors file, whole or not at all; returns what was written.

    `precision`: fp16 or fp32. `spaced` numbers the blocks in threes, see `Layout`. Raises InputError for a bundle and
    another name or precision, OutputExistsError, and ModelError for what such a file would not be read as.
    """
    if path.suffix != ".safetensors" or precision not in _STORED:
        raise InputError(
            f"output {str(path)!r} in {precision}: give a name that ends in .safetensors, and fp16 or fp32"
        )
    check_file_free(path, overwrite, [source.name, *inputs], ours=is_written_checkpoint)
    plan = plan_of(source, spaced)
    stored = torch_dtype(precision)
    # A LoRA is added to whole weights, and only the sum is rounded.
    loaded = torch_dtype("fp32") if loras_of(source) else stored
    with written(path) as stream:
        stream.write(_header(plan, _STORED[precision], stored.itemsize))
        for index, part in enumerate(plan.parts):
            progress(part.name, index / len(plan.parts))
            state = load_component(source, part.name, loaded).state_dict()  # type: ignore[arg-type]
            for name, owns in part.rows.items():
                tensor = part.tensor(owns, state).to(stored)
                if not tensor.isfinite().all():
                    raise ModelError(
                        f"weight {name} of {source.name!r} is not finite in {precision}: "
                        + ("choose fp32" if precision == "fp16" else "its files are damaged")
                    )
                stream.write(tensor.numpy().data)
            del state
    return plan


def _header(plan: Plan, dtype: str, size: int) -> bytes:
    """What a .safetensors file begins with: the length of the JSON, padded to eight bytes, and the JSON."""
    table: dict[str, Any] = {"__metadata__": dict(plan.metadata)}
    end = 0
    for part in plan.parts:
        for name, owns in part.rows.items():
            shape = part.shape(owns)
            start, end = end, end + size * math.prod(shape)
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    table |= {name: {"dtype": dtype, "shape": (0,), "data_offsets": (end, end)} for name in plan.marks}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def plan_of(source: ModelSource, spaced: bool = False) -> Plan:
    """What `write_single_file` writes of a model, of which only configs and scheduler are loaded; raises as it does."""
    if source.kind == "bundle":
        raise InputError(
            f"{source.name!r} is a bundle, whose weights are in graphs: give the model that it was made from"
        )
    config, family = full_config(source.unet_config), family_of_unet(source.unet_config)
    noise = load_rest(source).scheduler.config
    kind = str(noise.get("prediction_type", "epsilon"))
    width, context = config["block_out_channels"][0], config["cross_attention_dim"]
    names = [name for name in models_of(width, context) if MODELS[name][0] is family]
    if not names or kind not in ("epsilon", V):
        raise ModelError(
            f"the UNet of {source.name!r} (width {width}, text of width {context}, predicts {kind}) is like that of no "
            f"published model, and programs know only these in a single file: {_ADVICE}"
        )
    name = named(names, kind)
    layout = replace(Layout.of(config), spaced=spaced)
    parts = tuple(_part(source, family, MODELS[name][1], part, layout) for part in family.parts)
    marks: tuple[str, ...] = ()
    if family.addition and kind == V:  # as ComfyUI reads SDXL's
        marks = ("v_pred", "ztsnr") if noise.get("rescale_betas_zero_snr") else ("v_pred",)
    return Plan(
        parts, marks, _metadata(source, family, name, kind), tuple(_notes(source, family, config, noise, marks))
    )


def _part(source: ModelSource, family: Family, model: PublishedModel, part: str, layout: Layout) -> Part:
    config = source.config(part)
    usual = part_classes(family, part)[0]
    kind = config.get("_class_name") or (*(source.index.get(part) or ()), None, None)[1] or usual
    if part == "vae" and kind != usual:
        raise ModelError(f"the vae of {source.name!r} is {an(kind)}, and the original code has none such: {_ADVICE}")
    module = empty(part, config, kind)
    own, read = _configs(part, module, config, family, model, layout)
    if wrong := [f"{key} {own[key]} (read as {read.get(key)})" for key in own if own[key] != read.get(key)]:
        raise ModelError(
            f"the {part} of {source.name!r} has {', '.join(wrong)}, for which a single file has no place: {_ADVICE}"
        )
    places = places_of(part, module, layout, _text_prefix(family, part, own.get("hidden_act")))
    shapes = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    if missing := [name for name in shapes if name not in places]:
        raise ModelError(
            f"the {part} of {source.name!r} has weights that the original code has no name for ({missing[0]} and "
            f"{len(missing) - 1} others): {_ADVICE}"
        )
    return Part(part, places, shapes)


def _configs(
    part: str, module: Any, config: Mapping[str, Any], family: Family, model: PublishedModel, layout: Layout
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must agree: of a part's config, and of the one that a reader gives the file."""
    if part == "unet":
        own = full_config(config)
        read = unet_config(model, layout, own["in_channels"], own["time_cond_proj_dim"])
        own["attention_head_dim"] = own["num_attention_heads"] or own["attention_head_dim"]
        return _plain(own, _LAYOUT), _plain(read, _LAYOUT)
    own, read = (module_config(one) for one in (module, empty(part, part_config(family, model, part))))
    if part == "vae":
        return _plain(own), _plain(read)
    return {key: own.get(key) for key in _TEXT}, {key: read.get(key) for key in _TEXT}


def _plain(config: Mapping[str, Any], left_out: Collection[str] = ()) -> dict[str, Any]:
    """A config in which a value for each level is one value where they are equal."""
    kept = {key: value for key, value in config.items() if key[0] != "_" and key not in (*_OPEN, *left_out)}
    lists = {key: tuple(value) for key, value in kept.items() if isinstance(value, list | tuple)}
    return kept | {key: value[0] if len(set(value)) == 1 else value for key, value in lists.items()}


def _text_prefix(family: Family, part: str, activation: str | None) -> str:
    """What the names of a text encoder begin with: CLIP's mean quick_gelu to every program, OpenCLIP's gelu."""
    ending = ".transformer." if activation == "quick_gelu" else ".model."
    prefixes = (prefix for encoder in family.text_encoders if encoder.part == part for prefix in encoder.prefixes)
    return next((prefix for prefix in prefixes if prefix.endswith(ending)), "")


def _metadata(source: ModelSource, family: Family, name: str, kind: str) -> dict[str, str]:
    """Modelspec's keys (Stability AI's ModelSpec 1.0.0), which other programs show, and what sdkd reads."""
    size = source.native_size
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": _ARCHITECTURES.get(name, name),
        "implementation": _CODE[family.name],
        "title": Path(source.name).name,
        "prediction_type": "v" if kind == V else kind,
        **({"resolution": f"{size[1]}x{size[0]}"} if size else {}),
    }
    known = {key: source.provenance[key] for key in ("teacher", "student") if key in source.provenance}
    random = {"random_weights": True} if source.random_weights else {}
    about = {**known, **random, **entry(source.generation)}
    kept = {ABOUT: json.dumps(about, sort_keys=True)} if about else {}
    return {"format": "pt", **CHECKPOINT_MARK, **{_SPEC + key: value for key, value in spec.items()}, **kept}


def _notes(
    source: ModelSource, family: Family, config: Mapping[str, Any], noise: Mapping[str, Any], marks: tuple[str, ...]
) -> Iterator[str]:
    """What the file cannot carry, or what not every program reads in it."""
    if made := source.generation:
        yield f"it is to be run with {made}: sdkd reads that in the file, in other programs set it yourself"
    if config["time_cond_proj_dim"]:
        yield "its UNet takes the guidance scale as an embedding, which other programs pass over"
    if noise.get("prediction_type") == V and not marks:
        yield "it predicts v_prediction: sdkd reads that in the file, other programs judge by weights or ask you"
    usual = {"num_train_timesteps": 1000, **family.noise}
    other = {key: value for key in _NOISE if (value := noise.get(key)) and value != usual.get(key)}
    for key, value in other.items():
        if not (key == "rescale_betas_zero_snr" and "ztsnr" in marks):
            yield f"its scheduler has {key} {value}, which the file does not say: set it where you run it"
