"""Images that `sdkd generate` starts from: which of diffusers' pipelines they ask for, and what they must be like."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.conditions import guidance_width
from sdkd.core.images import read_mask, read_rgb
from sdkd.errors import EngineError, InputError
from sdkd.families import Family, family_of_unet
from sdkd.models.families import new_pipeline
from sdkd.models.kinds import BundleSource
from sdkd.models.source import ModelSource

if TYPE_CHECKING:
    from PIL.Image import Image

READERS = {"image": read_rgb, "mask": read_mask, "control": read_rgb}


@dataclass(frozen=True)
class PipelineKind:
    """One of diffusers' pipelines: its image arguments by input, its scales with defaults.

    `sized`: whether the call takes height and width; if not, they are the image's. `embeds`: whether it gives a UNet
    that takes the guidance scale as an embedding this embedding.
    """

    task: str  # in the names of diffusers' classes
    images: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    sized: bool = True
    embeds: bool = True

    def of(self, family: Family) -> str:
        """The class of the pipeline in a family."""
        return family.pipeline(self.task)

    @property
    def changes_image(self) -> bool:
        """Whether noise is added to an image, and only the steps from there on are done."""
        return "strength" in self.scales

    def arguments(self, images: Sequence[Mapping[str, Image]], scales: Mapping[str, float]) -> dict[str, Any]:
        """What a call gets: of every image to draw, what it starts from, since each is encoded with its own seed."""
        given = {argument: [one[name] for one in images] for argument, name in self.images.items()}
        return given | {CALLED.get(name, name): scales[name] for name in self.scales}


TEXT = PipelineKind("")
PIPELINE_KINDS: dict[frozenset[str], PipelineKind] = {
    frozenset(): TEXT,
    frozenset({"image"}): PipelineKind("Img2Img", {"image": "image"}, {"strength": 0.8}, sized=False),
    frozenset({"image", "mask"}): PipelineKind("Inpaint", {"image": "image", "mask_image": "mask"}, {"strength": 1.0}),
    frozenset({"control"}): PipelineKind("ControlNet", {"image": "control"}, {"control_scale": 1.0}),
    frozenset({"image", "control"}): PipelineKind(
        "ControlNetImg2Img",
        {"image": "image", "control_image": "control"},
        {"strength": 0.8, "control_scale": 1.0},
        embeds=False,
    ),
    frozenset({"image", "mask", "control"}): PipelineKind(
        "ControlNetInpaint",
        {"image": "image", "mask_image": "mask", "control_image": "control"},
        {"strength": 1.0, "control_scale": 1.0},
        embeds=False,
    ),
}
EDIT = PipelineKind("InstructPix2Pix", {"image": "image"}, {"image_guidance_scale": 1.5}, sized=False, embeds=False)
# UNets that look at images beside the latents, by input channels: what they are, and the inputs that they can have.
SEEING: dict[int, tuple[str, tuple[frozenset[str], ...], str]] = {
    8: ("an instruct-pix2pix model", (frozenset({"image"}),), "give --image FILE alone"),
    9: (
        "an inpainting model",
        (frozenset({"image", "mask"}), frozenset({"image", "mask", "control"})),
        "give --image FILE and --mask FILE",
    ),
}
CALLED = {"control_scale": "controlnet_conditioning_scale"}  # scales that diffusers calls otherwise
ACTS_ON = {
    "strength": "the image of image-to-image and inpainting: give --image FILE",
    "control_scale": "the ControlNet: give --control FILE",
    "image_guidance_scale": "the image of an instruct-pix2pix model (a UNet of 8 input channels)",
}


@dataclass(frozen=True)
class Inputs:
    """Image files as given, by input (`image`, `mask`, `control`), the images in them, and the scales that are set."""

    files: Mapping[str, Path] = field(default_factory=dict)
    images: Mapping[str, Image] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    def settings(self) -> dict[str, object]:
        """What a PNG says about them."""
        return {**self.files, **self.scales}

    def arguments(self, kind: PipelineKind, count: int) -> dict[str, Any]:
        """What a call for `count` images that all start from these gets."""
        return kind.arguments([self.images] * count, self.scales)


def read_inputs(files: Mapping[str, Path | None], scales: Mapping[str, float | None]) -> Inputs:
    """Read the images that are given; InputError for a file that cannot be, a mask alone, a strength outside 0..1."""
    given = {name: path for name, path in files.items() if path is not None}
    if "mask" in given and "image" not in given:
        raise InputError(f"mask {str(given['mask'])!r} has no image to act on: give --image FILE, too")
    strength = scales.get("strength")
    if strength is not None and not 0 <= strength <= 1:
        raise InputError(f"strength {strength:g} is not in 0..1: give 0 to keep the image, up to 1 to ignore it")
    images = {name: read_image(name, path) for name, path in given.items()}
    return Inputs(given, images, {name: value for name, value in scales.items() if value is not None})


def read_image(name: str, path: Path) -> Image:
    """One image as sdkd.core.images reads it, a mask in grey; InputError when it is missing or unreadable."""
    if not path.is_file():
        raise InputError(f"{name} {str(path)!r} is no file: give a PNG, JPEG or other image file")
    return READERS[name](path, f"{name} {str(path)!r}", "save it again as PNG or JPEG")


def resized(inputs: Inputs, height: int, width: int) -> tuple[Inputs, list[str]]:
    """The images in the size to draw (pixels, Lanczos), and a line about each that had another."""
    from PIL.Image import Resampling

    other = {name: image for name, image in inputs.images.items() if image.size != (width, height)}
    lines = [
        f"{name} {inputs.files[name]}: {image.width}x{image.height} px resized to {width}x{height} px (width x height)"
        for name, image in other.items()
    ]
    made = {name: image.resize((width, height), Resampling.LANCZOS) for name, image in other.items()}
    return replace(inputs, images={**inputs.images, **made}), lines


def kind_for(channels: int, names: frozenset[str]) -> PipelineKind:
    """The pipeline for a UNet of so many input channels and these inputs, which go together."""
    return EDIT if channels == 8 else PIPELINE_KINDS[names]


def find_kind(
    model: str, unet_config: Mapping[str, Any], inputs: Inputs, negative_prompt: str | None = None
) -> PipelineKind:
    """The pipeline for a model and what is given beside a prompt; InputError when they do not go together.

    `unet_config` says what the UNet takes: 4 channels are latents alone, a guidance embedding leaves no place for
    guidance by a second prompt.
    """
    names, channels = frozenset(inputs.files), int(unet_config.get("in_channels", 4))
    what, possible, advice = SEEING.get(channels, ("", tuple(PIPELINE_KINDS), ""))
    if names not in possible:
        found = " and ".join(f"--{name}" for name in inputs.files) or "no image"
        raise InputError(
            f"model {model!r} is {what} (its UNet takes {channels} channels), and was given {found}: {advice}"
        )
    kind = kind_for(channels, names)
    for name in inputs.scales:
        if name not in kind.scales:
            raise InputError(
                f"--{name.replace('_', '-')} {inputs.scales[name]:g} has nothing to act on here: it is for "
                f"{ACTS_ON[name]}, or leave it out"
            )
    if guidance_width(unet_config) is not None:
        embedded = f"model {model!r} takes its guidance scale as an embedding (its UNet has time_cond_proj_dim)"
        if not kind.embeds:
            named = kind.of(family_of_unet(unet_config))
            raise InputError(f"{embedded}, and diffusers' {named} gives it none: give --image or --control")
        if negative_prompt:
            raise InputError(f"{embedded}, and looks at one prompt: leave out --negative-prompt {negative_prompt!r}")
    return kind


def with_defaults(inputs: Inputs, kind: PipelineKind, steps: int) -> Inputs:
    """All scales of a pipeline; InputError when its strength leaves none of the steps."""
    scales = {name: inputs.scales.get(name, default) for name, default in kind.scales.items()}
    if kind.changes_image and done_steps(scales, steps) < 1:
        raise InputError(
            f"strength {scales['strength']:g} leaves none of {steps} steps: give --strength "
            f"{math.ceil(100 / steps) / 100:g} or more, or more --steps"
        )
    return replace(inputs, scales=scales)


def done_steps(scales: Mapping[str, float], steps: int) -> int:
    """How many of the steps diffusers does: a strength leaves the first ones out."""
    return min(int(steps * scales.get("strength", 1.0)), steps)


def check_control(source: ModelSource, target: str | None, inputs: Inputs) -> None:
    """InputError, before anything is loaded, when a control image is given and there is no ControlNet to read it."""
    if "control" not in inputs.files:
        return
    has = isinstance(source, BundleSource) and "controlnet" in source.bundle.manifest.components
    if not has or target == "eager":
        why = "runs eagerly without its ControlNet" if has else "has no ControlNet"
        advice = (
            "leave out --target eager"
            if has
            else f"make a bundle with one: sdkd export {shlex.quote(source.name)} artifacts/bundle --controlnet FOLDER"
        )
        raise InputError(
            f"control {str(inputs.files['control'])!r} was given, and model {source.name!r} {why}: {advice}"
        )


def check_encoder(source: ModelSource, slot: str, inputs: Inputs) -> None:
    """EngineError, before anything is loaded, when a bundle's VAE would have to encode an image and only decodes."""
    if "image" not in inputs.files or slot == "eager" or not isinstance(source, BundleSource):
        return
    if f"{slot}/vae_encoder" not in source.bundle.manifest.engines:
        from engines.modules.vae import NO_ENCODER

        raise EngineError(NO_ENCODER)


def known_config(source: ModelSource) -> Mapping[str, Any] | None:
    """Config of a model's UNet, read without its weights; None where that would need a download."""
    return source.unet_config if source.here else None


def as_pipeline(pipe: Any, name: str, more: Mapping[str, Any] | None = None) -> Any:
    """The pipeline as another class of diffusers, of the same components and `more`; itself where it is of it."""
    import diffusers

    if type(pipe).__name__ == name:
        return pipe
    absent = dict.fromkeys(("safety_checker", "feature_extractor"))
    return new_pipeline(getattr(diffusers, name), pipe.components | dict(more or {}) | absent, pipe.config)
