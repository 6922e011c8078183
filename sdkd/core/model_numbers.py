"""Numbers of a model's configuration, bounded before anything is built from them: no layer count of 1e9, no 0 heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdkd.core.numbers import Bounds

_SIZE = Bounds(1, 1 << 20, whole=True)  # channels, heads, tokens, pixels
_LAYERS = Bounds(1, 256, whole=True)
_SCALE = Bounds(above=0.0, high=1e6)
_WORDS = Bounds(1, 1 << 24, whole=True)
# What a key's value, or every number in its list, may be; keys that a configuration leaves out, or null, have defaults.
BOUNDS = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "conditioning_channels", "block_out_channels",
         "encoder_block_out_channels", "decoder_block_out_channels", "conditioning_embedding_out_channels",
         "attention_head_dim", "num_attention_heads", "cross_attention_dim", "norm_num_groups", "sample_size",
         "hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim", "time_cond_proj_dim"),
        _SIZE,
    ),
    **dict.fromkeys(
        ("layers_per_block", "num_hidden_layers", "num_encoder_blocks",
         "num_decoder_blocks"),
        _LAYERS,
    ),
    "transformer_layers_per_block": Bounds(0, 256, whole=True),
    "vocab_size": _WORDS,
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
    "controlnet": ("cross_attention_dim", "block_out_channels"),
    "text_encoder": ("hidden_size", "max_position_embeddings"),
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
