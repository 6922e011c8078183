"""Published recipes as YAML in the package: what was trained how, and who says so."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from sdkd.distill.training.config import TrainConfig, make_config
from sdkd.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """A named set of settings; `source` is where they come from, `notes` what the sources disagree on or leave out."""

    name: str
    objective: str
    about: str
    source: str
    notes: str
    settings: dict[str, Any]

    def config(self, **changes: Any) -> TrainConfig:
        """The recipe's config; `changes` win, None leaves a setting alone."""
        return make_config(self.objective, self.settings, changes)


def recipe_names() -> list[str]:
    """All recipes, sorted."""
    folder = resources.files(__package__) / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str, objective: str | None = None) -> Recipe:
    """A recipe by name; InputError when there is none, or it is for another objective than the one asked for."""
    import yaml

    if name not in recipe_names():
        raise InputError(f"recipe {name!r} is unknown: choose one of {', '.join(recipe_names())}")
    text = (resources.files(__package__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    found = Recipe(name=name, **{"notes": "", **yaml.safe_load(text)})
    if objective is not None and found.objective != objective:
        raise InputError(f"recipe {name!r} is for sdkd {found.objective}, not for sdkd {objective}: use that command")
    return found
