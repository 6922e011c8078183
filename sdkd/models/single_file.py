"""A checkpoint in one .safetensors file, in the layout of the original Stable Diffusion code, without a hub.

The file carries weights only. Which family it is, is read from shapes; the configuration, the tokenizer and the
scheduler are sdkd's own (sdkd.models.families, sdkd.models.clip_tokenizer). The prediction type is not in the weights:
see `prediction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.files import sha256
from sdkd.core.text_files import read_yaml
from sdkd.errors import InputError, ModelError
from sdkd.families import MODELS, STABLE_DIFFUSION, SUPPORTED, Family, PublishedModel
from sdkd.models.families import empty, part_config, pipeline_rest
from sdkd.models.refusals import what_it_is
from sdkd.models.safetensors_file import Tensor, Weights, fill, matched

if TYPE_CHECKING:
    import torch

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", ("cond_stage_model.model.", "conditioner.embedders.0.model.")
# What the weights of each part begin with; SD 1.x has the first kind of text encoder, SD 2.x the others.
LDM_PREFIXES = {"unet": (UNET,), "vae": (VAE,), "text_encoder": (CLIP, *OPEN_CLIP)}
FIRST = UNET + "input_blocks.0.0.weight"
CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# Its standard deviation is above 0.09 in published v-prediction models and below in the others: ComfyUI's rule.
SPREAD = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
# What projects a guidance embedding, as the original layout would name it and as diffusers' converter leaves it.
GUIDANCE = tuple(f"{UNET}{name}.cond_proj.weight" for name in ("time_embed", "time_embedding"))
_V, _EPSILON = "v_prediction", "epsilon"
_WORDS = {"v": _V, "v_prediction": _V, "velocity": _V, "eps": _EPSILON, "epsilon": _EPSILON}
_ARCHITECTURES = {"stable-diffusion-v2-768-v": _V, "stable-diffusion-v2-512": _EPSILON}
_EMBEDDINGS = UNET + "label_emb."  # of images, in unCLIP


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint: table of contents, family, what its UNet takes and predicts, and notes."""

    weights: Weights
    family: Family
    model: PublishedModel
    channels: int
    guidance: Tensor | None  # projects the guidance embedding
    prediction_type: str
    notes: tuple[str, ...]

    @property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config, in which only its inputs are not the published model's."""
        width = self.guidance and self.guidance.shape[1]
        return {**self.model.unet, "in_channels": self.channels, "time_cond_proj_dim": width}

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the whole file."""
        return sha256(self.weights.path)

    def rest(self) -> Any:
        """The pipeline without its heavy parts."""
        scheduler = "LCMScheduler" if self.guidance else None
        return pipeline_rest(self.family, self.model, self.channels, self.prediction_type, scheduler)

    @cached_property
    def _located(self) -> dict[str, dict[str, Tensor]]:
        """Where each part's weights lie, by name; ModelError when any part is incomplete."""
        found = {}
        for part in self.family.parts:
            what, module = f"checkpoint {str(self.weights.path)!r}: its {part}", empty(part, self._config(part))
            places = located(part, module, self.weights.tensors)
            if part == "unet" and self.guidance:  # diffusers' conversion does not know it
                places["time_embedding.cond_proj.weight"] = self.guidance
            found[part] = matched(module, places, what)
        return found

    def _config(self, part: str) -> dict[str, Any]:
        return self.unet_config if part == "unet" else part_config(self.family, self.model, part)

    def load_part(self, part: str, dtype: torch.dtype) -> Any:
        """One of the heavy parts, in `dtype`; ModelError when any part of the checkpoint is incomplete."""
        return fill(empty(part, self._config(part)), self._located[part], dtype)


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise a checkpoint by its table of contents; ModelError when it is damaged, or says what else it is."""
    weights = Weights.open(path)
    what = f"checkpoint {str(path)!r}"
    if problem := what_it_is(weights.tensors, FIRST):
        raise ModelError(f"{what} {problem}")
    families, channels = _families(weights, what)
    for part, prefixes in LDM_PREFIXES.items():
        if not any(key.startswith(prefixes) for key in weights.tensors):
            raise ModelError(
                f"{what} has no {part} (no weight begins with {' or '.join(prefixes)}): give a checkpoint that holds "
                f"UNet, VAE and text encoder, or load it with that part and save it as a diffusers folder"
            )
    kind, reason = prediction(weights, families)
    name = next((name for name in families if MODELS[name][1].prediction_type == kind), families[0])
    guidance = next((weights.tensors[name] for name in GUIDANCE if name in weights.tensors), None)
    return Checkpoint(weights, *MODELS[name], channels, guidance, kind, _notes(weights, kind, reason))


def _families(weights: Weights, what: str) -> tuple[list[str], int]:
    """Names of the families with this UNet's width and context, and its number of input channels."""
    for name, axes in ((FIRST, 4), (CONTEXT, 2)):
        if name in weights.tensors and len(weights.tensors[name].shape) != axes:
            shape = list(weights.tensors[name].shape)
            raise ModelError(f"{what}: its weight {name} has shape {shape}, not {axes} axes: {SUPPORTED}")
    width, channels = weights.tensors[FIRST].shape[:2]
    context = weights.tensors[CONTEXT].shape[-1] if CONTEXT in weights.tensors else 0
    found = [name for name, (_, model) in MODELS.items() if _size(model) == (width, context)]
    if any(name.startswith(_EMBEDDINGS) for name in weights.tensors) and found:
        raise ModelError(f"{what} is unCLIP, whose UNet takes image embeddings as well: {SUPPORTED}")
    if not found or channels not in STABLE_DIFFUSION.by_channels:
        raise ModelError(
            f"{what} has an unknown UNet (width {width}, text of width {context}, {channels} input channels): sdkd "
            f"knows width 320 with text of width 768 (SD 1.x) or 1024 (SD 2.x) and "
            f"{', '.join(map(str, STABLE_DIFFUSION.by_channels))} input channels; of a student give the diffusers "
            "folder"
        )
    return found, channels


def _size(model: PublishedModel) -> tuple[int, int]:
    return model.unet.get("block_out_channels", (320,))[0], model.unet["cross_attention_dim"]


def prediction(weights: Weights, families: list[str]) -> tuple[str, str]:
    """What the UNet predicts, `epsilon` or `v_prediction`, and how that is known.

    The first that speaks: a file NAME.yaml beside the checkpoint (`model: {params: {parameterization: v}}`, the layout
    of the original configs), the file's own metadata (modelspec), a weight named `v_pred`; where a family has
    both kinds (SD 2.x text-to-image), the spread of one weight; else epsilon.
    """
    if said := _beside(weights.path):
        return said, f"says {weights.path.with_suffix('.yaml').name}"
    metadata = weights.metadata
    word = _WORDS.get(metadata.get("modelspec.prediction_type", "").lower())
    if said := word or _ARCHITECTURES.get(metadata.get("modelspec.architecture", "")):
        return said, "says the file's metadata"
    if "v_pred" in weights.tensors:
        return _V, "says a weight named v_pred"
    kinds = {MODELS[name][1].prediction_type for name in families}
    if len(kinds) == 1 or weights.tensors[FIRST].shape[1] != 4:
        return _EPSILON, "as all models of this family"
    if SPREAD in weights.tensors and float(weights.tensors[SPREAD].read().float().std(unbiased=False)) > 0.09:
        return _V, "judging by the spread of a weight"
    return _EPSILON, "judging by the spread of a weight"


def _beside(path: Path) -> str | None:
    """The prediction type that a YAML file of the checkpoint's name gives, in the original code's layout."""
    file = path.with_suffix(".yaml")
    if not file.is_file():
        return None
    try:
        params = read_yaml(file)["model"]["params"]
        return _WORDS[str(params.get("parameterization", "eps")).lower()]
    except (InputError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"configuration {str(file)!r}, which lies beside the checkpoint, cannot be read: it needs "
            "model: {params: {parameterization: eps}} or v; repair it or move it away"
        ) from error


def _notes(weights: Weights, kind: str, reason: str) -> tuple[str, ...]:
    other = "eps" if kind == _V else "v"
    notes = [
        f"predicts {kind} ({reason}); if images are noise, write "
        f"model: {{params: {{parameterization: {other}}}}} into {weights.path.with_suffix('.yaml').name} beside it"
    ]
    if any(name.startswith("model_ema.") for name in weights.tensors):
        notes.append("holds averaged (EMA) weights as well, which are not used")
    return tuple(notes)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, with as much of a tensor's ways as diffusers' conversion uses; nothing is read."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, index: tuple[Any, ...] | slice) -> _Stored:
        """Rows, or the two first axes of a convolution of one pixel."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if 0 in rest:
            return _Stored(self.tensor._replace(shape=self.shape[:2]) if set(self.shape[2:]) == {1} else self.tensor)
        start, end, _ = first.indices(self.shape[0])
        return _Stored(self.tensor.rows(start, end))

    def itself(self) -> _Stored:
        return self

    T = property(itself)
    clone = detach = contiguous = itself


def located(part: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a checkpoint has a part's weights, by diffusers' names, which are not always those of `module`.

    diffusers converts here where weights lie, not the weights: its `from_single_file` maps the whole file beside what
    is cast, and each is read when it is needed.
    """
    from diffusers.loaders import single_file_utils as ldm

    stored: dict[str, Any] = {name: _Stored(tensor) for name, tensor in tensors.items()}
    if part == "text_encoder":
        prefix = next((prefix for prefix in OPEN_CLIP if any(name.startswith(prefix) for name in tensors)), None)
        openclip = ldm.convert_open_clip_checkpoint
        found = openclip(module, stored, prefix) if prefix else ldm.convert_ldm_clip_checkpoint(stored)
    else:
        found = getattr(ldm, f"convert_ldm_{part}_checkpoint")(stored, module.config)
    return {name: one.tensor for name, one in found.items() if one is not None}  # None: of some names that are missing
