"""Which layers of a UNet a student keeps, and which transformer blocks of them; how configs say their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdkd.families import Family, family_named
from sdkd.families.student import MID, RESNET_MID, Blocks, StudentSpec

MID_ATTENTION = "mid_block.attentions.0"
_SIDES = ("down_blocks", "up_blocks")
_MID_LAYERS = {MID: ("resnets.0", "attentions.0", "resnets.1"), RESNET_MID: ("resnets.0",), None: ()}


def layer_map(spec: StudentSpec) -> dict[str, str]:
    """The resnets, attentions and samplers of a student, each with the teacher's module that it stands for."""
    return dict(_layers(family_named(spec.family), spec))


def _layers(family: Family, spec: StudentSpec) -> Iterator[tuple[str, str]]:
    kinds = [family.teacher[f"{side}_block_types"] for side in ("down", "up")]
    dropped = spec.dropped_levels
    kept = len(kinds[0]) - dropped
    for block in range(kept):
        yield from _block("down", block, block, kinds[0][block], spec.down_layers, sampler=block < kept - 1)
    for layer in _MID_LAYERS[spec.mid_block_type]:
        yield f"mid_block.{layer}", f"mid_block.{layer}"
    for block in range(kept):
        of = block + dropped
        yield from _block("up", block, of, kinds[1][of], spec.up_layers, sampler=block < kept - 1)


def _block(
    side: str, block: int, of: int, kind: str, layers: tuple[int, ...], *, sampler: bool
) -> Iterator[tuple[str, str]]:
    for index, source in enumerate(layers):
        for part in ("resnets", "attentions") if "CrossAttn" in kind else ("resnets",):
            yield f"{side}_blocks.{block}.{part}.{index}", f"{side}_blocks.{of}.{part}.{source}"
    if sampler:
        yield f"{side}_blocks.{block}.{side}samplers.0", f"{side}_blocks.{of}.{side}samplers.0"


def depths(config: Mapping[str, Any]) -> dict[str, int]:
    """The number of transformer blocks of every attention of a UNet's config, by the attention's module.

    `config` as in config.json, with the types of the blocks; other entries may be absent. Source: diffusers'
    UNet2DConditionModel.
    """
    levels, layers = len(config["down_block_types"]), config.get("layers_per_block", 2)
    layers = [layers] * levels if isinstance(layers, int) else layers
    given = config.get("transformer_layers_per_block", 1)
    given = [given] * levels if isinstance(given, int) else given
    backwards = config.get("reverse_transformer_layers_per_block") or given[::-1]
    down = [_each(*level) for level in zip(config["down_block_types"], given, layers, strict=False)]
    more = [count + 1 for count in layers[::-1]]
    up = [_each(*level) for level in zip(config["up_block_types"], backwards, more, strict=False)]
    return _by_module(down, _each(config["mid_block_type"], given[-1], 1)[:1], up)


def _each(kind: str | None, depth: int | Sequence[int], layers: int) -> Sequence[int]:
    """The depths of one block's attentions; of none where it is without."""
    if "CrossAttn" not in (kind or ""):
        return ()
    return (depth,) * layers if isinstance(depth, int) else depth


def _by_module(down: Sequence[Sequence[Any]], mid: Sequence[Any], up: Sequence[Sequence[Any]]) -> dict[str, Any]:
    found = {
        f"{side}.{block}.attentions.{layer}": value
        for side, blocks in zip(_SIDES, (down, up), strict=True)
        for block, layers in enumerate(blocks)
        for layer, value in enumerate(layers)
    }
    return found | dict.fromkeys([MID_ATTENTION][: len(mid)], *mid[:1])


def kept_blocks(spec: StudentSpec) -> dict[str, Blocks]:
    """Which of the teacher's transformer blocks each attention of a student keeps, by its module in the student.

    Empty where the student keeps all in the layers that it keeps.
    """
    kept = spec.transformers
    return {} if kept is None else _by_module(kept.down, [kept.mid] if kept.mid else [], kept.up)


def depth_entries(spec: StudentSpec) -> dict[str, Any]:
    """What a student's config says of its transformer blocks: by level where down and up agree, else by attention."""
    if (kept := spec.transformers) is None:
        return {}
    down, up = ([tuple(map(len, level)) for level in side] for side in (kept.down, kept.up))
    # diffusers takes no 0: a level without attention has a 1, which it does not read
    levels = tuple(max(level, default=1) for level in down)
    agree = all(set(level) <= {depth} for level, depth in zip((*down, *up[::-1]), 2 * levels, strict=True))
    by_attention = (tuple(level or 1 for level in side) for side in (down, up))
    found = (levels, None) if agree else by_attention
    return dict(zip(("transformer_layers_per_block", "reverse_transformer_layers_per_block"), found, strict=True))
