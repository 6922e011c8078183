"""How a run rounds forward passes to eight bits, from its settings; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator

from sdkd.core.contract import QUANTIZED
from sdkd.quantization.scheme import Scheme

WEIGHT_BITS = 7  # holds for CPUs without VNNI, whose sums overflow with 8, and for 8, which is finer


def scheme_of(quantize: str | None, weight_bits: int | None) -> Scheme | None:
    """How engines of a precision (int8, fp8) round; None for None.

    For int8 as ONNX Runtime does, which rounds most: what convolutions give, too. OpenVINO leaves that float; TensorRT
    as well, with coarser steps for inputs that are positive alone.
    """
    if quantize == "int8":
        return Scheme("u8", weight_bits or WEIGHT_BITS, outputs=True)
    return Scheme("e4m3") if quantize else None


def rounding_problems(
    quantize: str | None, weight_bits: int | None, calibrate_images: int | None, *, lora: bool
) -> Iterator[str]:
    """What is wrong with these settings of a run."""
    if quantize not in (None, *QUANTIZED):
        yield f"quantize {quantize!r} has more than eight bits: choose {' or '.join(QUANTIZED)}"
    if quantize and lora:
        yield (
            "quantize trains whole UNets, and a LoRA leaves its UNet as it is: give it to sdkd distill, or build the "
            "engine of the model with its LoRA: sdkd build-engine MODEL --lora FILE --target TARGET --precision int8"
        )
    if not quantize and (weight_bits, calibrate_images) != (None, None):
        yield "weight_bits and calibrate_images say how quantize rounds: add --quantize int8, or leave them out"
    if quantize == "fp8" and weight_bits is not None:
        yield f"weight_bits {weight_bits} are of int8, and fp8 has eight: leave them out"
