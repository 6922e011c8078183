"""How close a UNet call comes to what the machine can do: its work, the measured ceilings, the fraction reached.

The roofline model (Williams, Waterman & Patterson 2009): a call takes at least as long as its arithmetic at the
rate of the fastest matrix product or convolution, and at least as long as its least traffic at the rate of a copy.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sdkd.compare.measure.timing import Timer
from sdkd.core.contract import DTYPES, check_precision, torch_dtype
from sdkd.errors import InputError

if TYPE_CHECKING:
    import torch

BUDGET_S = 1.0  # for the matrix products, and as much for the copies
FEWEST_CALLS, MOST_CALLS = 3, 10  # timed, of one size
WARM_CALLS = 2  # before them, and out of the budget: libraries start up and choose kernels, on a GPU for a second
CPU_SIDES = (256, 512, 1024, 2048)  # of square matrices
CUDA_SIDES = (1024, 2048, 4096, 8192)
SIDE_GROWTH = 8  # a product of twice the side has eight times the work
CONVOLUTION = (2, 320, 64)  # batch, channels, side of the UNet's first level at 512 px; kernels of 3 x 3
COPY_BYTES, CUDA_COPY_BYTES = 256 * 2**20, 2**30  # beyond what caches hold
EXPLAINED = (
    "FLOPs of one UNet call: a multiply-add counts as 2; convolutions, linear layers and both products of attention "
    "count, element-wise work does not. Bytes: weights, inputs and output once, so a lower bound."
)


@dataclass(frozen=True)
class Work:
    """One UNet call: floating-point operations (a multiply-add is 2), and the fewest bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What the machine was seen to do: FLOP/s of a matrix product or convolution, bytes/s of a copy (both ways)."""

    flops_per_s: float
    bytes_per_s: float
    how: str


@dataclass(frozen=True)
class Limit:
    """A measured call against the ceilings.

    `least_s`: the time that arithmetic or traffic takes at least, `bound` which of the two; `fraction`: that time
    over the measured one. 1 is the ceiling; above it convolutions took fewer operations than counted (Winograd), or
    the weights of a small model stayed in the caches.
    """

    flops_per_s: float
    matrix_share: float
    least_s: float
    bound: Literal["compute", "memory"]
    fraction: float


def unet_work(
    config: Mapping[str, Any],
    batch: int,
    height_px_latent: int,
    width_latent: int,
    sequence: int = 77,
    element_bytes: int = 4,
) -> Work:
    """The work of one call of a UNet of this config, from the config alone: shapes on the meta device, no weights.

    `batch`: latents per call (twice the images with guidance); sizes in latents, `sequence` in tokens,
    `element_bytes` of a weight or activation. Activations inside the network are taken to cost no traffic.
    """
    key = json.dumps({name: value for name, value in config.items() if not name.startswith("_")}, sort_keys=True)
    return _unet_work(key, batch, height_px_latent, width_latent, sequence, element_bytes)


@functools.lru_cache(maxsize=64)
def _unet_work(key: str, batch: int, height: int, width: int, sequence: int, element_bytes: int) -> Work:
    from sdkd.students.blocks import count_macs, count_parameters, full_config

    config = full_config(json.loads(key))
    macs = count_macs(config, height=height, width=width, batch=batch, sequence=sequence)
    latents = batch * height * width * (config["in_channels"] + config["out_channels"])
    states = batch * sequence * config["cross_attention_dim"]
    return Work(2 * macs, element_bytes * (count_parameters(config) + latents + states))


def element_bytes(precision: str) -> int:
    """Bytes of one number in `fp32`, `fp16` or `bf16`; InputError for another name."""
    return 4 if check_precision(precision) == "fp32" else 2


def measure_ceilings(device: str, precision: str) -> Ceilings:
    """The largest rate of a square matrix product in this precision, and of a copy, seen on the device just now.

    On a CPU also that of a convolution, whose library may know the CPU better than the products' does; on CUDA
    convolutions may take fewer operations than are counted. Takes about BUDGET_S for each. PyTorch's threads as they
    are. In float32 on CUDA the products may use TF32, as convolutions do there by default: the ceiling is what the
    hardware offers to float32 tensors.
    """
    import torch

    name, dtype = DTYPES[check_precision(precision)], torch_dtype(precision)
    on_cuda = device.startswith("cuda")
    timer, sides = Timer(device), CUDA_SIDES if on_cuda else CPU_SIDES
    with _fastest_float32(on_cuda):
        side, product_rate = _fastest_product(timer, sides, dtype)
    remark = ", TF32 allowed" if on_cuda and precision == "fp32" else ""
    rates = {f"product of {side} × {side} matrices in {name}{remark}": product_rate}
    if not on_cuda:
        _, channels, wide = CONVOLUTION
        convolution = f"3 × 3 convolution of {channels} channels, {wide} × {wide}, in {name}"
        rates[convolution] = _convolution_rate(timer, dtype, product_rate)
    fastest = max(rates, key=rates.__getitem__)
    copied = CUDA_COPY_BYTES if on_cuda else COPY_BYTES
    bytes_per_s = _copy_rate(timer, copied)
    if on_cuda:
        torch.cuda.empty_cache()
    threads = "" if on_cuda else f", {torch.get_num_threads()} threads"
    return Ceilings(rates[fastest], bytes_per_s, f"{fastest}; copy of {copied // 2**20} MiB{threads}")


def fraction(work: Work, ceilings: Ceilings, seconds: float) -> Limit:
    """What a call that did `work` in `seconds` reached; InputError when no time passed."""
    if seconds <= 0:
        raise InputError(f"a call of {seconds} s has no rate: give the measured time, above 0")
    compute, memory = work.flops / ceilings.flops_per_s, work.bytes / ceilings.bytes_per_s
    least, rate = max(compute, memory), work.flops / seconds
    return Limit(
        flops_per_s=rate,
        matrix_share=rate / ceilings.flops_per_s,
        least_s=least,
        bound="compute" if compute >= memory else "memory",
        fraction=least / seconds,
    )


@contextlib.contextmanager
def _fastest_float32(on_cuda: bool) -> Iterator[None]:
    """Let float32 products use TF32 on CUDA; elsewhere "high" could mean bf16, so nothing is changed there."""
    import torch

    before = torch.get_float32_matmul_precision()
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if on_cuda:
            torch.set_float32_matmul_precision(before)


def _fastest_product(timer: Timer, sides: Sequence[int], dtype: torch.dtype) -> tuple[int, float]:
    """The side of the square matrices whose product ran at the largest rate, and the rate in FLOP/s.

    Larger ones are tried while time is left: a CPU without units for a half precision needs seconds for them.
    """
    import torch

    rates: dict[int, float] = {}
    left = BUDGET_S
    for side in sides:
        a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
        best, spent = _fastest_call(timer, functools.partial(torch.mm, a, b, out=torch.empty_like(a)), left / 2)
        rates[side] = 2 * side**3 / best
        left -= spent
        if best * SIDE_GROWTH > left:
            break
    return max(rates.items(), key=lambda item: item[1])


def _convolution_rate(timer: Timer, dtype: torch.dtype, product_rate: float) -> float:
    """FLOP/s of a convolution, channels last; 0 where products are so slow that it would take beyond BUDGET_S."""
    import torch

    batch, channels, side = CONVOLUTION
    flops = 2 * 9 * batch * (channels * side) ** 2
    if flops / product_rate > BUDGET_S / 2:
        return 0.0
    image, weights = (
        torch.randn(shape, device=timer.device).to(dtype, memory_format=torch.channels_last)
        for shape in ((batch, channels, side, side), (channels, channels, 3, 3))
    )
    with torch.inference_mode():
        best, _ = _fastest_call(timer, lambda: torch.nn.functional.conv2d(image, weights, padding=1), BUDGET_S)
    return flops / best


def _copy_rate(timer: Timer, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes from memory to memory of the device."""
    import torch

    source = torch.rand(size // 4, device=timer.device)  # float32; random, since GPUs can compress what repeats
    target = torch.empty_like(source)
    return 2 * size / _fastest_call(timer, lambda: target.copy_(source), BUDGET_S)[0]


def _fastest_call(timer: Timer, work: Callable[[], object], budget_s: float) -> tuple[float, float]:
    """Seconds of the fastest of some calls, and of all that were timed; what comes before, to warm up, counts nowhere.

    FEWEST_CALLS at least, MOST_CALLS at most, and between them no more than the budget lets expect.
    """
    for _ in range(WARM_CALLS):
        timer.time(work)  # which waits for the device, so that nothing of it is left to the next call
    samples = [timer.time(work) for _ in range(FEWEST_CALLS)]
    spent = sum(sample.wall_s for sample in samples)
    more = int((budget_s - spent) / (spent / FEWEST_CALLS))
    samples += [timer.time(work) for _ in range(min(more, MOST_CALLS - FEWEST_CALLS))]
    return min(sample.seconds for sample in samples), sum(sample.wall_s for sample in samples)
