"""Memory: what an engine takes, from its configs alone, and what there is.

    to run: the engine's own size + 2 x the largest tensor

The estimate stays below what was measured (see export/build/estimate.py for figures), so that it refuses only what
cannot go well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdkd.bundle.manifest import Bundle, ComponentRecord, EngineRecord
from sdkd.core.components import CACHED_UNET, TEXT_ENCODERS
from sdkd.core.contract import Contract
from sdkd.core.profiles import ShapeRanges, axis_ranges
from sdkd.errors import BuildError, SdkdError

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}  # of a weight
TENSOR_BYTES = {**BYTES, "int8": 2, "fp8": 2}  # between the layers of an engine of eight bits, where half precision is
FUSED_WIDTHS = range(12, 257)  # of one attention head, in half precision: see export/build/tensorrt_plan.py
FUSED_OPSET = 23  # from here on attention is one node
UNLIMITED = 1 << 62
GB = 1e9


@dataclass(frozen=True)
class Largest:
    """The largest tensor of a component: what it is and how many elements it has."""

    what: str
    elements: int


def largest_tensor(
    component: str, config: Mapping[str, Any], sizes: Mapping[str, int], fused: bool, opset: int = FUSED_OPSET
) -> Largest:
    """The largest tensor at given axis sizes (latents or pixels, tokens, calls with guidance), from the config alone.

    `fused`: whether attention of usual head widths never writes its scores.
    """
    return max(_TENSORS[component](config, sizes, fused and opset >= FUSED_OPSET), key=lambda one: one.elements)


def _unet(config: Mapping[str, Any], sizes: Mapping[str, int], fused: bool) -> Iterator[Largest]:
    widths: Sequence[int] = config["block_out_channels"]
    kinds = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * len(widths)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # diffusers' old name for it
    for level, width in enumerate(widths):
        tokens = (sizes["height"] >> level) * (sizes["width"] >> level)
        joined = width + widths[min(level + 1, len(widths) - 1)]  # on the way up, with the skip connection
        yield Largest(f"features of level {level + 1}", sizes["batch"] * joined * tokens)
        if "CrossAttn" in kinds[level]:
            count = heads[level] if isinstance(heads, Sequence) else heads
            yield Largest(f"feed-forward of level {level + 1}", sizes["batch"] * 8 * width * tokens)
            if not (fused and width // count in FUSED_WIDTHS):
                yield Largest(f"attention scores of level {level + 1}", sizes["batch"] * count * tokens**2)


def _vae(config: Mapping[str, Any], sizes: Mapping[str, int], fused: bool) -> Iterator[Largest]:
    widths = config.get("block_out_channels") or config["decoder_block_out_channels"]
    scale = 2 ** (len(widths) - 1)
    height, width = (sizes.get(axis) or sizes[f"image_{axis}"] // scale for axis in ("height", "width"))
    yield Largest("features of the image's size", sizes["batch"] * max(widths[:2]) * height * width * scale**2)
    if "decoder_block_out_channels" not in config and not (fused and widths[-1] in FUSED_WIDTHS):
        yield Largest("attention scores", sizes["batch"] * (height * width) ** 2)


def _text_encoder(config: Mapping[str, Any], sizes: Mapping[str, int], fused: bool) -> Iterator[Largest]:
    yield Largest("feed-forward", sizes["batch"] * sizes["sequence"] * 4 * config["hidden_size"])


def _last_layer(config: Mapping[str, Any], sizes: Mapping[str, int], fused: bool) -> Iterator[Largest]:
    """Of a UNet, whose first level has what its last layer has."""
    first = {key: config[key][:1] for key in ("block_out_channels", "down_block_types") if key in config}
    return _unet({**config, **first}, sizes, fused)


_TENSORS = {
    "unet": _unet,
    CACHED_UNET: _last_layer,
    "controlnet": _unet,
    "vae_decoder": _vae,
    "vae_encoder": _vae,
    **dict.fromkeys(TEXT_ENCODERS, _text_encoder),
}


def largest_of(bundle: Bundle, record: ComponentRecord, sizes: Mapping[str, int], fused: bool) -> Largest:
    """The largest tensor of an exported component at given axis sizes of its inputs; `fused` as in `largest_tensor`."""
    operators = record.details.get("operators", ("Attention",))  # attention taken apart writes its scores in any opset
    whole = fused and "Attention" in operators
    inner = largest_tensor(record.name, bundle.config(record.name), _inner(record.contract, sizes), whole, record.opset)
    outer = max(math.prod(spec.shape(sizes)) for spec in record.contract.inputs)
    return inner if inner.elements >= outer else Largest("an input", outer)


def _inner(contract: Contract, sizes: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes, fixed ones included: an export can have fixed some or all."""
    shapes = {spec.name: spec.shape(sizes) for spec in contract.inputs}
    first = shapes[contract.inputs[0].name]
    if len(first) == 2:
        return {"batch": first[0], "sequence": first[1]}
    prefix = "image_" if contract.component == "vae_encoder" else ""
    return {"batch": first[0], f"{prefix}height": first[2], f"{prefix}width": first[3]}


def fuses(target: str, precision: str) -> bool:
    """Whether a target's attention of usual head widths never writes its scores."""
    return precision != "fp32" and (target.startswith("tensorrt") or target == "inductor")


def corner(bundle: Bundle, record: ComponentRecord, profile: ShapeRanges, name: str) -> dict[str, int]:
    """Axis sizes of a component at a profile's `min`, `opt` or `max`."""
    axes = axis_ranges(record.contract, profile, bundle.scale(), bundle.positions())
    return {axis: getattr(r, name) for axis, r in axes.items()}


def workspace(bundle: Bundle, record: EngineRecord, name: str = "max") -> int:
    """Bytes that an engine takes beside itself when it runs at its profiles' `max` or `min`: 2 x the largest tensor."""
    component, fused = bundle.component(record.component), fuses(record.target, record.precision)
    tensors = [
        largest_of(bundle, component, corner(bundle, component, profile, name), fused).elements
        for profile in record.profiles
    ]
    pick = max if name == "max" else min
    return 2 * pick(tensors) * TENSOR_BYTES[record.precision]


def run_memory(bundle: Bundle, record: EngineRecord) -> int:
    """Bytes that an engine takes when it runs at its largest sizes."""
    return resident_bytes(bundle, record) + workspace(bundle, record)


def resident_bytes(bundle: Bundle, record: EngineRecord) -> int:
    """Bytes of an opened engine: its files, or its code and the graph's weights where it has none of its own."""
    own = record.flags.get("weights") == "graph"
    return record.total_bytes + (bundle.component(record.component).total_bytes if own else 0)


def check_room(what: str, kind: str, need: int, free: int, advice: str, error: type[SdkdError] = BuildError) -> None:
    """`error`, with both numbers and what to do, when more is needed than there is."""
    if need > free:
        raise error(f"{what} need about {size(need)} of {kind}, and {size(free)} are free: {advice}")


def size(count: int) -> str:
    """Bytes in words: `1.5 GB`, `0.3 MB`."""
    return f"{count / GB:,.1f} GB" if count >= GB / 10 else f"{count / 1e6:,.1f} MB"


def free_memory(cap: int = UNLIMITED) -> int:
    """Bytes of host memory that can be taken: what is free, of this control group too, and no more than `cap`."""
    import psutil

    return min(psutil.virtual_memory().available, _group_free(), cap)


def free_gpu_memory(cap: int = UNLIMITED) -> int:
    """Bytes of memory that are free on torch's current CUDA device, and no more than `cap`."""
    import torch

    return min(int(torch.cuda.mem_get_info()[0]), cap)


def _group_free() -> int:
    """What a container's limit leaves; a very large number where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
        return UNLIMITED if limit == "max" else int(limit) - int(used) + int(cached[1] if cached else 0)
    except (OSError, ValueError):
        return UNLIMITED
