"""A checkpoint in one .safetensors file, in the layout of the original Stable Diffusion code, without a hub.

The file carries weights only. Which model it is, is read from shapes, and a student's blocks from names; the rest of
the configuration, the tokenizers and the scheduler are sdkd's own (sdkd.families, sdkd.models.clip_tokenizer). The
prediction type is not in the weights: see `prediction`. `sdkd.models.single_file_writer` is the other direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.documents import parse_json
from sdkd.core.files import sha256
from sdkd.core.text_files import read_yaml
from sdkd.errors import InputError, ModelError
from sdkd.families import MODELS, SDXL, SUPPORTED, Family, PublishedModel
from sdkd.models.families import empty, part_config, pipeline_rest
from sdkd.models.ldm_names import UNET, VAE, Layout, Place, read_layout, text_places, unet_places, vae_places
from sdkd.models.refusals import what_it_is
from sdkd.models.safetensors_file import Tensor, Weights, fill, matched
from sdkd.students.blocks import full_config

if TYPE_CHECKING:
    import torch

ABOUT = "sdkd"  # key of the metadata: what sdkd knows of the model beside its weights, as JSON
FIRST = UNET + "input_blocks.0.0.weight"
_CONTEXT = ".attn2.to_k.weight"
_REFINED = (384, 1280)  # width and width of the text of SDXL's refiner
# Its standard deviation is above 0.09 in published v-prediction models and below in the others: ComfyUI's rule.
_SPREAD = UNET + "output_blocks.{}.1.transformer_blocks.0.norm1.bias"  # of the last block
# Names of other writers, for those of `sdkd.models.ldm_names`.
_OTHERS = ((".transformer.text_model.", ".transformer."), ("time_embedding.cond_proj", "time_embed.cond_proj"))
_GUIDANCE = UNET + "time_embedding.cond_proj.weight"
V, EPSILON = "v_prediction", "epsilon"
_WORDS = {"v": V, "v_prediction": V, "velocity": V, "eps": EPSILON, "epsilon": EPSILON}
_ARCHITECTURES = {"stable-diffusion-v2-768-v": V, "stable-diffusion-v2-512": EPSILON}
_EMBEDDINGS = UNET + "label_emb."  # of images, in unCLIP; of sizes, in SDXL


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint: table of contents, model, what its UNet is and predicts, and notes."""

    weights: Weights
    family: Family
    model: PublishedModel
    layout: Layout
    unet_config: Mapping[str, Any]
    prediction_type: str
    notes: tuple[str, ...]

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the whole file."""
        return sha256(self.weights.path)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What sdkd noted in a file that it wrote; empty for others. ModelError when it is damaged."""
        try:
            return dict(parse_json(self.weights.metadata.get(ABOUT, "{}").encode(), dict[str, Any]))
        except ValueError as error:
            raise ModelError(
                f"checkpoint {str(self.weights.path)!r} has damaged metadata ({error}): write it again"
            ) from error

    def rest(self) -> Any:
        """The pipeline without its heavy parts."""
        few = next((row for row in self.family.few_steps if row.of(self.weights.path.name)), None)
        scheduler = few.scheduler if few else None
        scheduler = "LCMScheduler" if self.unet_config["time_cond_proj_dim"] else scheduler
        channels = self.unet_config["in_channels"]
        pipe = pipeline_rest(self.family, self.model, channels, self.prediction_type, scheduler)
        changes: dict[str, Any] = {} if few is None else {"timestep_spacing": "trailing"}
        if "ztsnr" in self.weights.tensors:  # zero terminal signal-to-noise ratio (arXiv 2305.08891), as ComfyUI has it
            changes["rescale_betas_zero_snr"] = True
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
        return pipe

    @cached_property
    def _located(self) -> dict[str, dict[str, Tensor]]:
        """Where each part's weights lie, by name; ModelError when any part is incomplete."""
        found = {}
        for part in self.family.parts:
            what, module = f"checkpoint {str(self.weights.path)!r}: its {part}", empty(part, self.config(part))
            prefix = _prefix(self.family, part, self.weights.tensors)
            places = places_of(part, module, self.layout, prefix)
            found[part] = matched(module, _located(places, self.weights.tensors), what)
        return found

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part."""
        return dict(self.unet_config) if part == "unet" else part_config(self.family, self.model, part)

    def load_part(self, part: str, dtype: torch.dtype) -> Any:
        """One of the heavy parts, in `dtype`; ModelError when any part of the checkpoint is incomplete."""
        return fill(empty(part, self.config(part)), self._located[part], dtype)


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise a checkpoint by its table of contents; ModelError when it is damaged, or says what else it is."""
    weights = Weights.open(path)
    what = f"checkpoint {str(path)!r}"
    if problem := what_it_is(weights.tensors, FIRST):
        raise ModelError(f"{what} {problem}")
    names, channels = _models(weights, what)
    family = MODELS[names[0]][0]
    for part in family.parts:
        if not _prefix(family, part, weights.tensors):
            prefixes = " or ".join(_prefixes(family, part))
            raise ModelError(
                f"{what} has no {part} (no weight begins with {prefixes}): give a checkpoint that holds "
                f"{', '.join(family.parts)}, or load it with that part and save it as a diffusers folder"
            )
    guidance = _find(Place(_GUIDANCE), weights.tensors)
    try:
        layout = read_layout(weights.tensors)
        kind, reason = prediction(weights, names, layout)
        model = MODELS[named(names, kind)][1]
        config = unet_config(model, layout, channels, guidance and guidance.shape[-1])
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from error
    return Checkpoint(weights, family, model, layout, config, kind, _notes(weights, kind, reason))


def _models(weights: Weights, what: str) -> tuple[list[str], int]:
    """Names of the published models with this UNet's width and context, and its number of input channels."""
    context = next((name for name in weights.tensors if name.startswith(UNET) and name.endswith(_CONTEXT)), "")
    for name, axes in ((FIRST, 4), (context, 2)):
        if name and len(weights.tensors[name].shape) != axes:
            shape = list(weights.tensors[name].shape)
            raise ModelError(f"{what}: its weight {name} has shape {shape}, not {axes} axes: {SUPPORTED}")
    width, channels = weights.tensors[FIRST].shape[:2]
    size = (width, weights.tensors[context].shape[-1] if context else 0)
    if size == _REFINED:
        raise ModelError(f"{what} {SDXL.without['text_encoder']}")
    found = models_of(*size)
    family = MODELS[found[0]][0] if found else None
    if family and family.addition is None and any(name.startswith(_EMBEDDINGS) for name in weights.tensors):
        raise ModelError(f"{what} is unCLIP, whose UNet takes image embeddings as well: {SUPPORTED}")
    if family is None or channels not in family.by_channels:
        sizes = sorted({_size(model) for _, model in MODELS.values()})
        known = ", ".join(f"width {own} with text of width {text}" for own, text in sizes)
        raise ModelError(
            f"{what} has an unknown UNet (width {width}, text of width {size[1]}, {channels} input channels): sdkd "
            f"knows {known}, and 4, 8 or 9 input channels (SDXL: 4 or 9); give the diffusers folder"
        )
    return found, channels


def models_of(width: int, context: int) -> list[str]:
    """Names of the published models whose UNets have this width and read text of this width."""
    return [name for name, (_, model) in MODELS.items() if _size(model) == (width, context)]


def named(names: Sequence[str], prediction_type: str) -> str:
    """The published model among several of one shape: the one that predicts the same, else the first."""
    return next((name for name in names if MODELS[name][1].prediction_type == prediction_type), names[0])


def _size(model: PublishedModel) -> tuple[int, int]:
    return _widths(model)[0], model.unet["cross_attention_dim"]


def _widths(model: PublishedModel) -> tuple[int, ...]:
    return tuple(model.unet.get("block_out_channels", (320, 640, 1280, 1280)))  # as UNet2DConditionModel's default


def unet_config(model: PublishedModel, layout: Layout, channels: int, guidance: int | None) -> dict[str, Any]:
    """The whole config of a UNet with these blocks, else like a published model's; ModelError where none has them.

    What a published model's config says for each level, a student with fewer levels has for the finest ones.
    """
    levels = len(layout.widths)
    if layout.widths != _widths(model)[:levels]:
        raise ModelError(f"its UNet has levels of widths {layout.widths}, a published one has {_widths(model)}")
    own = {key: value[:levels] if isinstance(value, tuple) else value for key, value in model.unet.items()}
    return full_config({**own, **layout.config, "in_channels": channels, "time_cond_proj_dim": guidance})


def prediction(weights: Weights, names: Sequence[str], layout: Layout) -> tuple[str, str]:
    """What the UNet predicts, `epsilon` or `v_prediction`, and how that is known.

    The first that speaks: a file NAME.yaml beside the checkpoint (`model: {params: {parameterization: v}}`, the layout
    of the original configs), the file's own metadata (modelspec), a weight named `v_pred`; where both kinds are
    published (SD 2.x text-to-image), the spread of one weight; else epsilon.
    """
    if said := _beside(weights.path):
        return said, f"says {weights.path.with_suffix('.yaml').name}"
    metadata = weights.metadata
    word = _WORDS.get(metadata.get("modelspec.prediction_type", "").lower())
    if said := word or _ARCHITECTURES.get(metadata.get("modelspec.architecture", "")):
        return said, "says the file's metadata"
    if "v_pred" in weights.tensors:
        return V, "says a weight named v_pred"
    kinds = {MODELS[name][1].prediction_type for name in names}
    if len(kinds) == 1 or weights.tensors[FIRST].shape[1] != 4:
        return EPSILON, "as all models of its kind"
    last = weights.tensors.get(
        _SPREAD.format(
            max(int(name.split(".")[1]) for _, name in layout.modules() if name.startswith("output_blocks."))
        )
    )
    spread = float(last.read().float().std(unbiased=False)) if last else 0.0
    return V if spread > 0.09 else EPSILON, "judging by the spread of a weight"


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
    other = "eps" if kind == V else "v"
    notes = [
        f"predicts {kind} ({reason}); if images are noise, write "
        f"model: {{params: {{parameterization: {other}}}}} into {weights.path.with_suffix('.yaml').name} beside it"
    ]
    if any(name.startswith("model_ema.") for name in weights.tensors):
        notes.append("holds averaged (EMA) weights as well, which are not used")
    return tuple(notes)


def _prefixes(family: Family, part: str) -> tuple[str, ...]:
    """What the weights of a part may begin with."""
    texts = {encoder.part: encoder.prefixes for encoder in family.text_encoders}
    return {"unet": (UNET,), "vae": (VAE,), **texts}[part]


def _prefix(family: Family, part: str, names: Iterable[str]) -> str:
    """What the weights of a part begin with in a file; empty where it has none."""
    found = (prefix for prefix in _prefixes(family, part) if any(name.startswith(prefix) for name in names))
    return next(found, "")


def places_of(part: str, module: Any, layout: Layout, prefix: str) -> dict[str, Place]:
    """Where a file has the weights of a part, by the names of `module`, which may be empty."""
    names = list(module.state_dict())
    if part == "unet":
        return unet_places(names, layout)
    return vae_places(names, len(module.config.block_out_channels)) if part == "vae" else text_places(names, prefix)


def _find(place: Place, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What lies at a place, in the shape that diffusers gives it."""
    names = (place.name, *(place.name.replace(own, other) for own, other in _OTHERS if own in place.name))
    tensor = next((tensors[name] for name in names if name in tensors), None)
    if tensor is None:
        return None
    if place.third is not None and tensor.shape:
        size = tensor.shape[0] // 3
        tensor = tensor.rows(place.third * size, (place.third + 1) * size)
    if place.pixel and set(tensor.shape[2:]) == {1}:
        tensor = tensor._replace(shape=tensor.shape[:2])
    return tensor._replace(shape=tensor.shape[::-1], transposed=True) if place.transposed else tensor


def _located(places: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: _find(place, tensors) for name, place in places.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
