"""What a build will take, before minutes are spent: the largest tensor, memory and disk, against what there is.

The estimate stays below what was measured, so that it refuses only what cannot go well:

    host memory = 0.3 GB + 3 x weights (+ 2 x largest tensor at the compared shapes, where the engine is compared here)
    GPU memory  = 2 x weights + 2 x largest tensor at the largest shapes
    disk        = weights in the engine's precision, old engines stay until the new ones are there

Measured peaks of the building process (512 px, batch 1 with guidance): sd-tiny UNet, tensorrt-rtx fp16 2.3 GB for
0.65 GB of weights; onnxruntime fp32 7.0 GB and openvino fp32 6.7 GB for 1.3 GB of weights and 1.07 GB of attention
scores; VAE decoder, 0.6 GB, 3.2 GB and 2.9 GB for 0.1, 0.2 and 0.2 GB of weights and 0.27 GB of features.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.build_options import GIB, BuildOptions
from export.build_request import Request
from export.ranges import Geometry, check_shapes
from sdkd.bundle import Bundle, EngineRecord
from sdkd.contract import Contract
from sdkd.errors import BuildError, InputError
from sdkd.profiles import ShapeRanges
from sdkd.targets import check_target, gpu

LARGEST_VOLUME = 2**31 - 1  # elements of one tensor in TensorRT
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
FUSED_WIDTHS = range(12, 257)  # of one attention head, in half precision: see export/build_tensorrt.py
FUSED_OPSET = 23  # from here on attention is one node
BASE_BYTES = 300_000_000
GB = 1e9


@dataclass(frozen=True)
class Largest:
    """The largest tensor of a component: what it is and how many elements it has."""

    what: str
    elements: int


@dataclass(frozen=True)
class Estimate:
    """What building one engine takes, in bytes."""

    host: int
    gpu: int
    disk: int


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


_TENSORS = {"unet": _unet, "controlnet": _unet, "vae_decoder": _vae, "vae_encoder": _vae, "text_encoder": _text_encoder}


def check_volume(bundle: Bundle, request: Request) -> None:
    """InputError when a profile's largest shape has a tensor of more elements than TensorRT can count."""
    if not request.target.startswith("tensorrt"):
        return
    for profile in request.profiles:
        found = _at(bundle, request, _corner(bundle, request, profile, "max"), _fuses(request))
        if found.elements > LARGEST_VOLUME:
            raise InputError(
                f"{request.component.name} at {_largest(profile)} has {found.what} of {found.elements:,} elements, and "
                f"{request.target} can have {LARGEST_VOLUME:,} in a tensor: narrow --size or --batch"
                + ("" if _fuses(request) else ", or export in fp16, where attention needs no scores")
            )


def estimate(bundle: Bundle, request: Request) -> Estimate:
    """What building one engine takes: see the formula above."""
    target, record = check_target(request.target), request.component
    weights = record.total_bytes
    engine = round(weights * BYTES[request.precision] / BYTES[record.precision])
    largest = max(
        _at(bundle, request, _corner(bundle, request, one, "max"), _fuses(request)).elements for one in request.profiles
    )
    compared = 0 if target.runs_on_gpu else max(_compared(bundle, request))
    return Estimate(
        host=BASE_BYTES + 3 * weights + 2 * compared * BYTES[record.precision],
        gpu=2 * engine + 2 * largest * BYTES[request.precision] if target.builds_on_gpu else 0,
        disk=engine,
    )


def run_memory(bundle: Bundle, record: EngineRecord) -> int:
    """Bytes that an engine takes when it runs at its largest shapes: its own size and 2 x the largest tensor."""
    component = bundle.component(record.component)
    request = Request(component, record.target, record.slot, record.precision, record.profiles, record.flags)
    largest = max(
        _at(bundle, request, _corner(bundle, request, one, "max"), _fuses(request)).elements for one in record.profiles
    )
    return record.total_bytes + 2 * largest * BYTES[record.precision]


def _compared(bundle: Bundle, request: Request) -> Iterator[int]:
    for sizes in check_shapes(request.component.contract, request.profiles, Geometry.of(bundle)):
        yield _at(bundle, request, sizes, fused=False).elements


def _fuses(request: Request) -> bool:
    return request.precision != "fp32" and request.target.startswith("tensorrt")


def _at(bundle: Bundle, request: Request, sizes: Mapping[str, int], fused: bool) -> Largest:
    record = request.component
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


def _corner(bundle: Bundle, request: Request, profile: ShapeRanges, name: str) -> dict[str, int]:
    axes = Geometry.of(bundle).axes(request.component.contract, profile)
    return {axis: getattr(r, name) for axis, r in axes.items()}


def _largest(profile: ShapeRanges) -> str:
    return f"batch {profile.batch.max}, {profile.height.max}x{profile.width.max} px"


def check_resources(bundle: Bundle, requests: Sequence[Request], options: BuildOptions) -> None:
    """Refuse what cannot go well: InputError for a tensor too large, BuildError for memory or disk, with the numbers.

    Engines are built one after the other: the largest need counts, and on disk their sum.
    """
    if not requests:
        return
    for request in requests:
        check_volume(bundle, request)
    needs = {request.component.name: estimate(bundle, request) for request in requests}
    host = max(needs, key=lambda name: needs[name].host)
    advice = "close other programs, narrow --size and --batch, or leave it out of --components"
    check_room(f"the builds, {host} most of all,", "memory", needs[host].host, free_memory(options), advice)
    if requests[0].target == "tensorrt" and gpu():
        name = max(needs, key=lambda name: needs[name].gpu)
        check_room(f"the builds, {name} most of all,", "GPU memory", needs[name].gpu, free_gpu_memory(options), advice)
    disk = sum(need.disk for need in needs.values())
    free = shutil.disk_usage(bundle.path).free
    check_room(f"engines in {str(bundle.path)!r}", "disk space", disk, free, "free some, or copy the bundle elsewhere")


def check_room(what: str, kind: str, need: int, free: int, advice: str) -> None:
    """BuildError, with both numbers and what to do, when more is needed than there is."""
    if need > free:
        raise BuildError(f"{what} need about {size(need)} of {kind}, and {size(free)} are free: {advice}")


def size(count: int) -> str:
    """Bytes in words: `1.5 GB`, `0.3 MB`."""
    return f"{count / GB:,.1f} GB" if count >= GB / 10 else f"{count / 1e6:,.1f} MB"


def free_memory(options: BuildOptions) -> int:
    """Bytes of host memory that a build may take: what is free, of this control group too, or less by the option."""
    import psutil

    return min(psutil.virtual_memory().available, _group_free(), _cap(options))


def free_gpu_memory(options: BuildOptions) -> int:
    """Bytes of GPU memory that a build may take."""
    import torch

    return min(int(torch.cuda.mem_get_info()[0]), _cap(options))


def _cap(options: BuildOptions) -> int:
    return int(options.memory_cap_gb * GIB) if options.memory_cap_gb else 1 << 62


def _group_free() -> int:
    """What a container's limit leaves; a very large number where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
        return (1 << 62) if limit == "max" else int(limit) - int(used) + int(cached[1] if cached else 0)
    except (OSError, ValueError):
        return 1 << 62
