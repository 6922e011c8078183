"""What `sdkd inspect` shows of an int8 or fp8 engine: how it was rounded, how good that is, how fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkd.bundle.quantized import Quality, Quantized
from sdkd.core.console import table
from sdkd.quantization.words import decision_words, percent

SHOWN = 30  # layers in the table of sensitivities; the rest is counted


def decision(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """JSON-ready: the record in words, and what programs would count themselves; None for an engine in float."""
    if (found := Quantized.of(flags)) is None:
        return None
    return {
        "words": decision_words(found),
        "rounded_layers": found.rounded_layers,
        "float_layers": len(found.float_layers),
        "float_reasons": found.reasons,
        "worst_error": found.quality.worst,
        "within_limit": found.quality.kept,
        "most_sensitive": [{"layer": name, "squared_error": value} for name, value in found.ranking],
    }


def short(row: Mapping[str, Any]) -> list[Any]:
    """Lines below the table of a slot, and the errors by timestep."""
    found = Quantized.of(row["flags"])
    if found is None:
        why = row["flags"].get("stays_float")
        return [f"  {row['component']}: stays float ({why})"] if isinstance(why, str) else []
    return [*(f"  {row['component']}: {line}" for line in decision_words(found)), *_errors(found.quality)]


def _errors(quality: Quality) -> list[Any]:
    """The errors by timestep as a table; nothing where none was measured."""
    if not quality.simulated and not quality.engine:
        return []
    simulated = {step.timestep: step.relative for step in quality.simulated}
    engine = {step.timestep: step.relative for step in quality.engine or ()}
    rows = [
        [f"{timestep:g}", *(percent(each[timestep]) if timestep in each else "-" for each in (simulated, engine))]
        for timestep in sorted({*simulated, *engine}, reverse=True)
    ]
    return [table("Prediction against the float one", ["timestep", "rounded in PyTorch", "engine"], rows)]


def details(row: Mapping[str, Any]) -> list[Any]:
    """Which layers stay float, and how much each changes the prediction when it alone is rounded, the largest first."""
    found = Quantized.of(row["flags"])
    if found is None or found.light:
        return []
    parts: list[Any] = [f"  calibration: {found.asked.calibration[:12] or 'not named'}"]
    if found.float_layers:
        layers: dict[str, list[str]] = {}
        for layer, reason in found.float_layers.items():
            layers.setdefault(reason, []).append(layer)
        parts += [f"  in float, {reason}: {', '.join(names)}" for reason, names in layers.items()]
    if not found.ranking:
        return [*parts, "  how much single layers change was not recorded"]
    rows = [
        [layer, percent(max(value, 0.0) ** 0.5), "float" if layer in found.float_layers else "rounded"]
        for layer, value in found.ranking[:SHOWN]
    ]
    others = len(found.ranking) - SHOWN
    rows += [[f"{others} others", f"less than {rows[-1][1]}", ""]] if others > 0 else []
    return [*parts, table("Layers rounded alone", ["layer", "changes the prediction by about", "built as"], rows)]
