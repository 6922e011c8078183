"""Which teacher features each student matches, as data. A down block gives its output after downsampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkd.students.blocks import StudentSpec, student_spec

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

# preset -> (levels dropped, mid block kept) -> pairs. A loss is the sum over the pairs of their mean squared errors.
PAIRS: dict[str, dict[tuple[int, bool], tuple[Pair, ...]]] = {
    "segmind": {
        (0, True): (*_OUTER[:4], _MID, *_OUTER[4:]),
        (0, False): _OUTER,
        (1, False): (*_TINY_DOWN, _TINY_INNER, *_TINY_UP),
    },
    "bk-sdm": {(0, True): _OUTER, (0, False): _OUTER, (1, False): (*_TINY_DOWN, _TINY_ATTENTION, *_TINY_UP)},
}


def same_pairs(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Pairs of a student that has all of its teacher's blocks: each block with itself."""
    middle = [_MID] if config.get("mid_block_type") else []
    down, up = (len(config[f"{side}_block_types"]) for side in ("down", "up"))
    return (*_OUTER[:4][:down], *middle, *_OUTER[4:][:up])


def feature_pairs(student: str | StudentSpec, preset: str | None = None) -> tuple[Pair, ...]:
    """Pairs (teacher module, student module) of a student; the preset defaults to the student's own.

    Source: Segmind's distill-sd and Nota's BK-SDM, from the layer tables of their trainers.
    """
    spec = student_spec(student)
    return PAIRS[preset or spec.pairs][spec.dropped_levels, spec.keeps_mid_block]
