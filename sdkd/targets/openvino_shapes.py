"""An OpenVINO model compiled for the very shapes of its calls, where these are few.

For a range of shapes the CPU plugin works out memory and layouts in every call; for one shape, when it compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shapes = Mapping[str, Sequence[int]]
MOST_COPIES = 3  # of an image in a UNet call: instruct-pix2pix


def corners(profile: Mapping[str, Sequence[Sequence[int]]]) -> tuple[Shapes, ...]:
    """The smallest and the largest shapes of a profile where only guidance is between them; else nothing.

    `profile`: smallest, best and largest shape by input. A UNet for a fixed number of images of one size is called with
    one latent for each of them, or with two (three) under guidance.
    """
    least, most = ({name: tuple(shapes[end]) for name, shapes in profile.items()} for end in (0, -1))
    pairs = [(low, most[name]) for name, low in least.items() if low != most[name]]
    if pairs and all(low[1:] == high[1:] and high[0] <= MOST_COPIES * low[0] for low, high in pairs):
        return least, most
    return ()


class ByShape:
    """Compiled models by the shapes of a call: one for each corner, made at its first call, one for all others.

    `build` compiles for a corner, or for the whole range where it is None.
    """

    def __init__(self, few: Sequence[Shapes], build: Callable[[Shapes | None], Any]) -> None:
        self._few, self._build = tuple(few), build
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, shapes: Shapes) -> tuple[Any, Any]:
        """The compiled model for inputs of these shapes, and an infer request of it."""
        asked = {name: tuple(shape) for name, shape in shapes.items()}
        place = self._few.index(asked) if asked in self._few else len(self._few)
        if place not in self._made:
            compiled = self._build(asked if place < len(self._few) else None)
            self._made[place] = compiled, compiled.create_infer_request()
        return self._made[place]

    def usual(self) -> Any:
        """The model that is compiled first: for the largest corner, guided, or for the whole range."""
        return self.of(self._few[-1] if self._few else {})[0]


def compiled_for(core: Any, model: Any, options: Mapping[str, Any], corner: Shapes | None) -> Any:
    """A model compiled on the CPU, for a corner or as it is; the model stays, and shares its weights."""
    if corner is not None:
        model = model.clone()
        model.reshape({name: list(shape) for name, shape in corner.items()})
    return core.compile_model(model, "CPU", dict(options))
