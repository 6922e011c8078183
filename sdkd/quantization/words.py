"""In words how an engine was rounded, how good that is, and how fast: for people who never saw a scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkd.bundle.quantized import Quality, Quantized

_ACTIVATIONS = {
    "u8": "activations in 8 bits with a zero point",
    "s8": "activations in 8 bits, symmetric",
    "e4m3": "activations in E4M3",
    "none": "activations in float",
}


def scheme_words(scheme: Mapping[str, Any]) -> str:
    """A `sdkd.quantization.scheme.Scheme` as JSON, in words; what this version does not know is named as it is."""
    kind = str(scheme.get("activations"))
    weights = "weights in E4M3" if kind == "e4m3" else f"weights in {scheme.get('weight_bits', 8)} bits"
    found = [_ACTIVATIONS.get(kind, f"activations in {kind}"), f"{weights} per output channel"]
    found += ["convolutions' outputs, too"] if scheme.get("outputs") else []
    smooth = scheme.get("smooth")
    return ", ".join(found + ([] if smooth is None else [f"linear layers smoothed (alpha {smooth:g})"]))


def percent(value: float) -> str:
    """A relative error with two digits: `3.4 %`, `0.012 %`."""
    return f"{100 * value:.2g} %" if abs(value) < 1 else f"{100 * value:.0f} %"


def quality_words(quality: Quality) -> str:
    """The largest error of the prediction, and what it was measured on."""
    if quality.worst is None:
        return "how far its prediction is from the float one was not measured"
    limit = "" if quality.limit is None else f" (limit {percent(quality.limit)})"
    how = "" if quality.engine is not None else ", rounded in PyTorch: the engine did not run where it was built"
    over = "" if quality.kept or quality.limit is None else ", which is over it"
    return f"prediction at most {percent(quality.worst)} from the float one{limit}{over}{how}"


def decision_words(found: Quantized, reasons: bool = True) -> list[str]:
    """What was decided and measured when the engine was built, a sentence each; `reasons`: why layers stay float."""
    lines = [scheme_words(found.asked.scheme)]
    if found.light:
        return lines
    why = "; ".join(f"{count} ({reason})" for reason, count in found.reasons.items()) if reasons else ""
    rounded = "" if found.rounded_layers is None else f"{found.rounded_layers} layers rounded, "
    lines.append(f"{rounded}{len(found.float_layers)} in float{': ' * bool(why)}{why}")
    lines.append(quality_words(found.quality))
    if images := found.quality.image_psnr_db:
        spread = f"{min(images):.1f}" if len(images) == 1 else f"{min(images):.1f} to {max(images):.1f}"
        lines.append(f"images {spread} dB PSNR from float ones")
    if found.speed is not None:
        medians = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in found.median_seconds.items())
        lines.append(
            f"{found.speed.times:.2f}× as fast as {found.speed.against}"
            + (f" (a UNet call: {medians})" * bool(medians))
        )
    else:
        lines.append("its speed was not measured against half precision")
    return lines
