"""Narrow stand-ins for published models, one of each shape, with which single files are written and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest

from sdkd.families import MODELS, SDXL, STABLE_DIFFUSION, PublishedModel
from sdkd.models import families
from sdkd.models.resolve import load_component, resolve

END = "<|endoftext|>"
VAE = {key: value for key, value in helpers.VAE.items() if key != "sample_size"}
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
}  # fmt: skip
OPEN_CLIP = CLIP | {"hidden_size": 48, "hidden_act": "gelu", "projection_dim": 48}
UNET_2 = helpers.TEACHER_UNET | {"cross_attention_dim": 48, "use_linear_projection": True}
UNET_XL = {
    **SDXL.models["sdxl"].unet,
    "sample_size": 8,
    "block_out_channels": (16, 32, 64),
    "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 80,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 6 * 8,
}
MINI = {
    "mini": PublishedModel(helpers.TEACHER_UNET, (CLIP,), (END,), 64, "epsilon", "PNDMScheduler", VAE),
    "mini2base": PublishedModel(UNET_2, (OPEN_CLIP,), ("!",), 64, "epsilon", "DDIMScheduler", VAE),
    "mini2": PublishedModel(UNET_2, (OPEN_CLIP,), ("!",), 64, "v_prediction", "DDIMScheduler", VAE),
    "minixl": PublishedModel(UNET_XL, (CLIP, OPEN_CLIP), (END, "!"), 64, "epsilon", "EulerDiscreteScheduler", VAE),
}


@contextmanager
def mini_models() -> Iterator[None]:
    """Inside, sdkd takes them for published ones: `random:mini`, `random:minixl`, ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "clip_tokenizer", cache(families.clip_tokenizer))  # takes longest of all
        for name, model in MINI.items():
            patch.setitem(MODELS, name, (SDXL if name == "minixl" else STABLE_DIFFUSION, model))
        yield


def loaded(model: str | Path) -> SimpleNamespace:
    """A model's parts, without what else a pipeline has."""
    source = resolve(model)
    return SimpleNamespace(**{part: load_component(source, part) for part in source.parts})


def differing(one: Any, other: Any, parts: tuple[str, ...]) -> list[str]:
    """Names of the weights that differ between two pipelines, or that one of them lacks."""
    found = []
    for part in parts:
        first, second = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        found += [f"{part}.{name}" for name in first.keys() ^ second.keys()]
        found += [f"{part}.{name}" for name in first.keys() & second.keys() if not first[name].equal(second[name])]
    return found
