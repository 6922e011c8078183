"""What a request of any API asks for, as data, and how much may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from sdkd.core.numbers import Bounds, check_numbers

LORA_STRENGTH = Bounds(-100, 100)


@dataclass(frozen=True)
class LoraWish:
    """A LoRA of the server's folder by its name, and how strongly it is added."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class Wanted:
    """Images that somebody asks for; None: the model's own. Sizes in pixels, image i has the seed `seed` + i.

    `seed` None: by chance. `image` and `mask`: the bytes of image files; white of a mask is drawn again.
    """

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    n: int = 1
    loras: tuple[LoraWish, ...] = ()
    image: bytes | None = None
    mask: bytes | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how much may wait. InputError for numbers that allow nothing."""

    steps: int = 150
    n: int = 8
    pixels: int = 4 * 1024 * 1024  # of an image, drawn or given
    body_bytes: int = 32 * 1024 * 1024
    queue: int = 64  # images that wait
    prompt_characters: int = 10_000
    loras: int = 8
    body_seconds: float = 60.0  # between two parts of a body

    def __post_init__(self) -> None:
        whole = {name: Bounds(1, whole=True) for name in vars(self)}
        check_numbers(vars(self), whole | {"body_seconds": Bounds(above=0)})
