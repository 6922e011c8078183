"""Numbers that people and files give: whether one is a number, finite and within its bounds, said in one message.

Comparisons alone do not do it: `nan < 0` is false, `True` is 1, and an option is not the only way in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sdkd.errors import InputError

_LONG = 128  # bits of the longest whole number that is written out


@dataclass(frozen=True)
class Bounds:
    """What a number may be: `low` and `high` belong to it, `above` and `below` do not; None: no limit."""

    low: float | None = None
    high: float | None = None
    whole: bool = False
    above: float | None = None
    below: float | None = None

    def problem(self, name: str, value: object) -> str:
        """What is wrong with a value and what to give instead; empty when nothing is."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"{name} {value!r} is not a number: give {self}"
        if self.whole and not isinstance(value, Integral):
            return f"{name} {value} is not a whole number: give {self}"
        number: float = int(value) if isinstance(value, Integral) else float(value)
        if number != number or number in (float("inf"), float("-inf")):
            return f"{name} {number} is not finite: give {self}"
        if (self.low is not None and number < self.low) or (self.above is not None and number <= self.above):
            return f"{name} {_shown(number)} is too small: give {self}"
        if (self.high is not None and number > self.high) or (self.below is not None and number >= self.below):
            return f"{name} {_shown(number)} is too large: give {self}"
        return ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if None not in (self.low, self.high):
            return f"{kind} from {_shown(self.low)} to {_shown(self.high)}"
        limits = (("of at least", self.low), ("above", self.above), ("of at most", self.high), ("below", self.below))
        words = [f"{word} {_shown(limit)}" for word, limit in limits if limit is not None]
        return f"{kind} {' and '.join(words)}" if words else f"a finite {kind.removeprefix('a ')}"


def _shown(number: object) -> str:
    """A number in few characters: Python refuses to write out an int of thousands of digits."""
    if isinstance(number, int) and number.bit_length() > _LONG:
        return f"{'-' if number < 0 else ''}2^{number.bit_length() - 1}"
    return f"{number}"


def check_number(
    name: str, value: object, low: float | None = None, high: float | None = None, *, whole: bool = False
) -> None:
    """InputError, which names value and bounds, for NaN, infinity, what is out of bounds and what is no number.

    A bool and a text are no numbers; a float is no `whole` one, even 2.0.
    """
    if problem := Bounds(low, high, whole).problem(name, value):
        raise InputError(problem)


def check_numbers(values: Mapping[str, object], table: Mapping[str, Bounds]) -> None:
    """InputError, which names everything that is wrong at once; None and names without bounds are left alone."""
    problems = [
        problem
        for name, bounds in table.items()
        if values.get(name) is not None and (problem := bounds.problem(name.replace("_", " "), values[name]))
    ]
    if problems:
        raise InputError("; ".join(problems))


SEED = Bounds(0, 2**64 - 1, whole=True)  # what torch.Generator.manual_seed takes
SHARE = Bounds(0, 1)

# Of images to draw, in options, in Python and in comparisons; sizes in pixels.
DRAWING = {
    "height": Bounds(1, 1 << 15, whole=True),
    "width": Bounds(1, 1 << 15, whole=True),
    "steps": Bounds(1, 10_000, whole=True),
    "guidance_scale": Bounds(0, 1000),
    "image_guidance_scale": Bounds(0, 1000),
    "control_scale": Bounds(-100, 100),
    "seed": SEED,
    "count": Bounds(1, 1_000_000, whole=True),
    "batch": Bounds(1, 4096, whole=True),
    "num_processes": Bounds(1, 1024, whole=True),
    "cache_interval": Bounds(1, 10_000, whole=True),
    "runs": Bounds(1, 100_000, whole=True),
    "min_seconds": Bounds(0, 86_400),
}

# Of a model's configuration, bounded before anything is built from them: no layer count of 1e9, no 0 heads.
_SIZE = Bounds(1, 1 << 20, whole=True)  # channels, heads, tokens, pixels
_SCALE = Bounds(above=0.0, high=1e6)
# What a key's value, or every number in its list, may be; keys that a configuration leaves out, or null, have defaults.
BOUNDS = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "conditioning_channels", "block_out_channels",
         "encoder_block_out_channels", "decoder_block_out_channels", "conditioning_embedding_out_channels",
         "attention_head_dim", "num_attention_heads", "cross_attention_dim", "norm_num_groups", "sample_size",
         "hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim", "time_cond_proj_dim",
         "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
        _SIZE,
    ),
    **dict.fromkeys(
        ("layers_per_block", "num_hidden_layers", "num_encoder_blocks", "num_decoder_blocks"),
        Bounds(1, 256, whole=True),
    ),
    **dict.fromkeys(
        ("transformer_layers_per_block", "reverse_transformer_layers_per_block"), Bounds(0, 256, whole=True)
    ),
    "vocab_size": Bounds(1, 1 << 24, whole=True),
    "scaling_factor": _SCALE,
    "norm_eps": _SCALE,
    "layer_norm_eps": _SCALE,
    "num_train_timesteps": Bounds(1, 100_000, whole=True),
    "beta_start": Bounds(0, 1),
    "beta_end": Bounds(0, 1),
}  # fmt: skip
# What the config.json of a bundle's component always says.
NEEDED = {
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "sample_size", "block_out_channels"),
    "unet_cached": ("in_channels", "out_channels", "cross_attention_dim", "block_out_channels"),
    "controlnet": ("cross_attention_dim", "block_out_channels"),
    "text_encoder": ("hidden_size", "max_position_embeddings"),
    "text_encoder_2": ("hidden_size", "max_position_embeddings", "projection_dim"),
    "vae_decoder": ("latent_channels",),
    "vae_encoder": ("latent_channels",),
}
_LEVELS = 8  # halvings of an image; Stable Diffusion has 4
_PER_LEVEL = ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels")


def config_problem(config: Mapping[str, Any], component: str = "") -> str:
    """What is wrong with the numbers of a component's or scheduler's config.json, with the key; empty when nothing.

    `component`: of a bundle, whose configurations leave nothing out that is needed.
    """
    if missing := [key for key in NEEDED.get(component, ()) if config.get(key) is None]:
        return f"{missing[0]} is missing"
    if component.startswith("vae_") and not any(config.get(key) for key in _PER_LEVEL):
        return "block_out_channels is missing"
    return next(_problems(config), "")


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key, bounds in BOUNDS.items():
        for value in _numbers(config.get(key)):
            if problem := bounds.problem(key, value):
                yield problem
    for key in _PER_LEVEL:
        if isinstance(levels := config.get(key), list) and not 1 <= len(levels) <= _LEVELS:
            yield f"{key} has {len(levels)} levels: give 1 to {_LEVELS}"


def _numbers(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value
