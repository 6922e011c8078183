"""The families of models that sdkd works on, and which one a model is of.

Adding a family: a module like `sdxl` with its data, a row in FAMILIES, and its tests (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkd.families.family import Family, PublishedModel, TextEncoder
from sdkd.families.sdxl import SDXL
from sdkd.families.stable_diffusion import STABLE_DIFFUSION
from sdkd.families.student import LossWeights, StudentSpec

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "MODELS",
    "PIPELINES",
    "SDXL",
    "STABLE_DIFFUSION",
    "STUDENTS",
    "STUDENT_NAMES",
    "SUPPORTED",
    "Family",
    "LossWeights",
    "PublishedModel",
    "StudentSpec",
    "TextEncoder",
    "family_named",
    "family_of_pipeline",
    "family_of_unet",
]

FAMILIES = (STABLE_DIFFUSION, SDXL)
MODELS: Mapping[str, tuple[Family, PublishedModel]] = {
    name: (family, model) for family in FAMILIES for name, model in family.models.items()
}
STUDENTS: Mapping[str, StudentSpec] = {spec.name: spec for family in FAMILIES for spec in family.students}
STUDENT_NAMES = "; ".join(
    f"of {family.title}: {', '.join(spec.short for spec in family.students)}" for family in FAMILIES
)
# Pipelines that sdkd takes, and the class that loads each.
PIPELINES = {kind: loaded for family in FAMILIES for kind, loaded in family.pipelines.items()}
# Pipelines that always give their UNet the guidance scale as an embedding, and stop without a word where it takes none.
EMBEDDING = tuple(kind for family in FAMILIES for kind in family.embedding)
SUPPORTED = "sdkd works on " + " and ".join(family.title for family in FAMILIES)


def family_named(name: str) -> Family:
    """The family of a `name`; KeyError for another."""
    return {family.name: family for family in FAMILIES}[name]


def family_of_pipeline(kind: str) -> Family | None:
    """The family that a pipeline class of diffusers is of, one with a ControlNet included; None for others."""
    known = (family for family in FAMILIES if kind in (*family.pipelines, family.controlnet))
    return next(known, None)


def family_of_unet(config: Mapping[str, Any]) -> Family:
    """The family of a UNet's config, by what it takes beside the text; Stable Diffusion's where that is nothing."""
    addition = config.get("addition_embed_type")
    return next((family for family in FAMILIES if family.addition == addition), STABLE_DIFFUSION)
