"""The calibration of a bundle's UNet: recorded once in a pipeline run in PyTorch, and used for all targets."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.bundle.manifest import Bundle
from sdkd.bundle.quantized import CALIBRATION_FILE
from sdkd.core.conditions import asked_for
from sdkd.core.console import Progress
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import BundleError, InputError, ModelError

if TYPE_CHECKING:
    from sdkd.quantization.calibration import Calibration

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a watercolour of a lighthouse at dusk",
    "a bowl of oranges on a wooden table, soft morning light",
    "portrait of an old fisherman, black and white, film grain",
    "a crowded street market in the rain, neon signs, night",
    "a red fox in deep snow, telephoto",
    "isometric drawing of a small library, flat colours",
    "an empty desert road under a wide blue sky",
)


@dataclass(frozen=True)
class CalibrationWish:
    """What is asked of a calibration; None: what the bundle has, or the defaults.

    `prompts`: one image each, in turn; `images` in all; `steps` of each; `file`: a calibration of the same weights.
    """

    prompts: tuple[str, ...] | None = None
    images: int | None = None
    steps: int | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.prompts:
            raise InputError("no prompts to calibrate with: give a file with one prompt a line")
        for name, number in (("images", self.images), ("steps", self.steps)):
            if number is not None and number < 1:
                raise InputError(f"--calibrate-{name} {number} gives nothing to calibrate with: give 1 or more")
        if self.file is not None and (self.prompts or self.images or self.steps):
            raise InputError(f"calibration {str(self.file)!r} is there already: give it, or prompts, images and steps")

    def answered(self, about: Mapping[str, Any]) -> bool:
        """Whether a calibration, by its own record, is what is asked for."""
        images = len(about["seeds"])
        prompts = self.prompts and [self.prompts[number % len(self.prompts)] for number in range(images)]
        asked = ((prompts, about["prompts"]), (self.images, images), (self.steps, about["steps"]))
        return all(wanted in (None, found) for wanted, found in asked)


def calibration_file(bundle: Path) -> Path:
    """Where a bundle keeps its UNet's calibration."""
    return bundle / CALIBRATION_FILE


def check_calibratable(bundle: Bundle) -> None:
    """BundleError for a bundle that cannot be run in PyTorch to be calibrated; nothing is loaded."""
    components = bundle.manifest.components
    missing = [name for name in bundle.family.components if name not in components and name != "vae_encoder"]
    if missing:
        raise BundleError(
            f"bundle {str(bundle.path)!r} has no {', '.join(missing)}, and a calibration draws whole images: export "
            "the model again with all its components"
        )
    if "controlnet" in components:
        raise BundleError(
            f"bundle {str(bundle.path)!r} has a ControlNet, whose residuals a calibration from prompts does not have: "
            "export the model without it for int8 or fp8"
        )


def check_recorded(bundle: Bundle) -> None:
    """BundleError for a UNet with inputs that no calibration has."""
    if found := asked_for(bundle.component("unet").contract):
        raise BundleError(
            f"the UNet of bundle {str(bundle.path)!r} takes {found}, which no calibration has: export the model "
            "without it for int8 or fp8"
        )


def calibrated(bundle: Bundle, wish: CalibrationWish, profile: ShapeRanges, progress: Progress) -> Path:
    """The bundle's calibration file: the one that is there when it is what is asked for, else recorded now.

    `profile`: of the engine, whose best size the images have. Takes minutes for a full-size model; what was recorded
    is gone on with after an interrupt. Raises ModelError for a file of another model's weights, BundleError as
    `check_calibratable` and `check_recorded`, InputError where it would replace ranges of training, ValuesError for
    NaN or infinity.
    """
    from sdkd.quantization.calibration import Calibration

    check_recorded(bundle)
    weights, file = bundle.component("unet").source_sha256, calibration_file(bundle.path)
    if wish.file is not None:
        _check_weights(given := Calibration.load(wish.file), weights, wish.file)
        given.save(file)
        return file
    if file.is_file():
        found = Calibration.load(file)
        _check_weights(found, weights, file)
        if wish.answered(found.about):
            progress("calibration: recorded before, reused", None)
            return file
        _check_untrained(found, file)
    check_calibratable(bundle)
    _record(bundle, wish, profile, weights, progress).save(file)
    return file


def _check_weights(found: Calibration, weights: str, file: Path) -> None:
    if found.weights != weights:
        raise ModelError(
            f"calibration {str(file)!r} is of another model's UNet (weights {found.weights[:12]}, these are "
            f"{weights[:12]}): give one that was recorded with these weights, or leave it out"
        )


def _check_untrained(found: Calibration, file: Path) -> None:
    """InputError for ranges that weights were trained with, which a recording would replace."""
    if "trained" in found.about:
        raise InputError(
            f"calibration {str(file)!r} holds the ranges that this UNet was trained to be rounded with, and recording "
            "others would lose them: leave out --calibrate-prompts, --calibrate-images and --calibrate-steps"
        )


def _record(
    bundle: Bundle, wish: CalibrationWish, profile: ShapeRanges, weights: str, progress: Progress
) -> Calibration:
    from sdkd.models.bundle_modules import pipeline_of
    from sdkd.models.resolve import resolve
    from sdkd.quantization.recording import Usual, record

    usual = Usual.of(bundle.config("unet"), bundle.vae_config(), resolve(bundle.path).generation)
    images = wish.images or len(wish.prompts or ()) or usual.images
    return record(
        pipeline_of(bundle),
        wish.prompts or (_captions(images) if usual.small else PROMPTS),
        weights=weights,
        images=images,
        steps=wish.steps or usual.steps,
        guidance=usual.guidance,
        height=profile.height.opt,
        width=profile.width.opt,
        folder_for_partial=calibration_file(bundle.path).parent,
        progress=progress,
    )


def _captions(count: int) -> tuple[str, ...]:
    """Captions of drawn shapes, such as a small model was trained on."""
    from sdkd.toyworld.scenes import all_scenes, caption

    scenes = all_scenes()
    return tuple(map(caption, random.Random(0).sample(scenes, min(count, len(scenes)))))  # noqa: S311 (not a secret)
