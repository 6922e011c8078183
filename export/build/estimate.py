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

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from export.build.options import GIB, BuildOptions
from export.build.ranges import Geometry, check_shapes
from export.build.request import Request
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import (
    BYTES,
    TENSOR_BYTES,
    UNLIMITED,
    Largest,
    check_room,
    corner,
    free_gpu_memory,
    free_memory,
    fuses,
    largest_of,
)
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import InputError
from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import check_target, uses_gpu

LARGEST_VOLUME = 2**31 - 1  # elements of one tensor in TensorRT
BASE_BYTES = 300_000_000


@dataclass(frozen=True)
class Estimate:
    """What building one engine takes, in bytes."""

    host: int
    gpu: int
    disk: int


def check_volume(bundle: Bundle, request: Request) -> None:
    """InputError when a profile's largest shape has a tensor of more elements than TensorRT can count."""
    if not request.target.startswith("tensorrt"):
        return
    for profile in request.profiles:
        found = _largest_tensor(bundle, request, profile)
        if found.elements > LARGEST_VOLUME:
            fused = fuses(request.target, request.precision)
            shape = f"batch {profile.batch.max}, {profile.height.max}x{profile.width.max} px"
            raise InputError(
                f"{request.component.name} at {shape} has {found.what} of {found.elements:,} elements, and "
                f"{request.target} can have {LARGEST_VOLUME:,} in a tensor: narrow --size or --batch"
                f"{'' if fused else ', or export in fp16, where attention needs no scores'}"
            )


def estimate(bundle: Bundle, request: Request) -> Estimate:
    """What building one engine takes: see the formula above."""
    target, record = check_target(request.target), request.component
    weights = record.total_bytes
    engine = round(weights * BYTES[request.precision] / BYTES[record.precision])
    largest = max(_largest_tensor(bundle, request, one).elements for one in request.profiles)
    shapes = () if target.runs_on_gpu else check_shapes(record.contract, request.profiles, Geometry.of(bundle))
    compared = max((largest_of(bundle, record, sizes, fused=False).elements for sizes in shapes), default=0)
    return Estimate(
        host=host_memory(weights) + 2 * compared * BYTES[record.precision],
        gpu=2 * engine + 2 * largest * TENSOR_BYTES[request.precision] if uses_gpu(target) else 0,
        disk=0 if target.without_weights else engine,
    )


def host_memory(weights: int) -> int:
    """Bytes of memory that a build takes for a graph's bytes of weights alone."""
    return BASE_BYTES + 3 * weights


def _largest_tensor(bundle: Bundle, request: Request, profile: ShapeRanges) -> Largest:
    sizes = corner(bundle, request.component, profile, "max")
    return largest_of(bundle, request.component, sizes, fuses(request.target, request.precision))


def check_resources(bundle: Bundle, requests: Sequence[Request], options: BuildOptions) -> None:
    """Refuse what cannot go well: InputError for a tensor too large, BuildError for memory or disk, with the numbers.

    Engines are built one after the other: the largest need counts, and on disk their sum.
    """
    if not requests:
        return
    for request in requests:
        check_volume(bundle, request)
    needs = {request.component.name: estimate(bundle, request) for request in requests}
    cap = int(options.memory_cap_gb * GIB) if options.memory_cap_gb else UNLIMITED
    rooms = [("memory", {name: need.host for name, need in needs.items()}, free_memory(cap))]
    if uses_gpu(check_target(requests[0].target)) and gpu():
        rooms.append(("GPU memory", {name: need.gpu for name, need in needs.items()}, free_gpu_memory(cap)))
    advice = "close other programs, narrow --size and --batch, or leave it out of --components"
    for kind, wanted, free in rooms:
        most = max(wanted, key=wanted.__getitem__)
        check_room(f"the builds, {most} most of all,", kind, wanted[most], free, advice)
    disk = sum(need.disk for need in needs.values())
    free = shutil.disk_usage(bundle.path).free
    check_room(f"engines in {str(bundle.path)!r}", "disk space", disk, free, "free some, or copy the bundle elsewhere")
