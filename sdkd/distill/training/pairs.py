"""Which teacher features each student matches, as data. A down block gives its output after downsampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdkd.errors import InputError
from sdkd.families import STABLE_DIFFUSION, StudentSpec
from sdkd.students.blocks import student_spec
from sdkd.students.layout import kept_blocks, layer_map

Pair = tuple[str, str]  # module of the teacher, module of the student

_DOWN, _UP = [f"down_blocks.{level}" for level in range(4)], [f"up_blocks.{level}" for level in range(4)]
_OUTER: tuple[Pair, ...] = tuple((name, name) for name in (*_DOWN, *_UP))
_MID: Pair = ("mid_block", "mid_block")
_TINY_DOWN: tuple[Pair, ...] = ((_DOWN[0], _DOWN[0]), (_DOWN[1], _DOWN[1]))
_TINY_UP: tuple[Pair, ...] = tuple((_UP[level + 1], _UP[level]) for level in range(3))
# The student's deepest level against what the teacher's removed inner part gave (segmind) ...
_TINY_INNER: Pair = (_UP[0], _DOWN[2])
# ... or against the residual branch of the teacher's last attention there (bk-sdm).
_TINY_ATTENTION: Pair = ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out")

# Of Stable Diffusion: preset -> (levels dropped, mid block kept) -> pairs. A loss is the sum of the pairs' mean squared
# errors.
PAIRS: dict[str, dict[tuple[int, bool], tuple[Pair, ...]]] = {
    "segmind": {
        (0, True): (*_OUTER[:4], _MID, *_OUTER[4:]),
        (0, False): _OUTER,
        (1, False): (*_TINY_DOWN, _TINY_INNER, *_TINY_UP),
    },
    "bk-sdm": {(0, True): _OUTER, (0, False): _OUTER, (1, False): (*_TINY_DOWN, _TINY_ATTENTION, *_TINY_UP)},
}


def _layers(spec: StudentSpec) -> tuple[Pair, ...]:
    """Outputs of every resnet and attention, and of the middle block. Source: Segmind's distill_sdxl.py (SSD-1B)."""
    layers = ((of, own) for own, of in layer_map(spec).items() if "resnets" in own or "attentions" in own)
    outside = tuple(pair for pair in layers if not pair[0].startswith("mid_block"))
    return (*outside, _MID) if spec.mid_block_type else outside


def _self_attention(spec: StudentSpec) -> tuple[Pair, ...]:
    """Outputs of the self-attention of every transformer block that is kept. Source: KOALA, arXiv 2312.04005."""
    kept, attentions = kept_blocks(spec), (pair for pair in layer_map(spec).items() if "attentions" in pair[0])
    return tuple(
        (f"{of}.transformer_blocks.{source}.attn1", f"{own}.transformer_blocks.{index}.attn1")
        for own, of in attentions
        for index, source in enumerate(kept.get(own, (0,)))
    )


_MADE: dict[str, Callable[[StudentSpec], tuple[Pair, ...]]] = {"layers": _layers, "self-attention": _self_attention}
PRESETS = (*PAIRS, *_MADE)


def same_pairs(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Pairs of a student that has all of its teacher's blocks: each block with itself."""
    middle = [_MID] if config.get("mid_block_type") else []
    down, up = (len(config[f"{side}_block_types"]) for side in ("down", "up"))
    return (*_OUTER[:4][:down], *middle, *_OUTER[4:][:up])


def feature_pairs(student: str | StudentSpec, preset: str | None = None) -> tuple[Pair, ...]:
    """Pairs (teacher module, student module) of a student; the preset defaults to the student's own.

    InputError for a preset of another family's students. Source: Segmind's distill-sd and Nota's BK-SDM, from the layer
    tables of their trainers; of SDXL's students the functions above say theirs.
    """
    spec = student_spec(student)
    name = preset or spec.pairs
    if name in _MADE:
        return _MADE[name](spec)
    if spec.family != STABLE_DIFFUSION.name:
        raise InputError(f"pairs {name!r} are of students of {STABLE_DIFFUSION.title}: {spec.name} has {spec.pairs}")
    return PAIRS[name][spec.dropped_levels, spec.mid_block_type is not None]
