"""Engines of eight bits, in the child process of a build: which layers, the graph, the gate, and whether it pays.

A UNet's layers are rounded with the scales of its calibration. Those that cost most go back to float until the noise
prediction is near enough to the float UNet's at every timestep. The engine is then held against the float graph on the
same calls, and against whole images, and timed against the target's own half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.build.calibrate import calibration_file
from export.build.gate import Floats, image_psnr, prediction_rows, speed
from export.build.job import Built, Job
from export.build.parity import check_engine, shape_words, verdict
from sdkd.bundle.manifest import Bundle
from sdkd.core.components import TEXT_ENCODERS
from sdkd.core.console import Progress, within
from sdkd.errors import ValuesError
from sdkd.quantization.again import QUANTIZATION, layer_weights
from sdkd.quantization.scheme import Scheme, kept_reason
from sdkd.targets.fast_precisions import weight_bits
from sdkd.targets.registry import check_target, cpu_flags

if TYPE_CHECKING:
    import numpy as np

    from sdkd.quantization.calibration import Calibration
    from sdkd.quantization.sensitivity import Choice

ROUNDED = ".rounded"  # folder beside an engine while it is built
Builder = Callable[[Job, Progress], Built]
LIMIT = 0.1  # of the relative error of a noise prediction, at any timestep: 20 dB
MOST_FLOAT = 0.34  # of the layers may stay float to keep the error below it


@dataclass(frozen=True)
class Rounded:
    """What was decided about a UNet before its engine is built, and the graph that says it."""

    graph: Path
    layers: tuple[str, ...]  # that are rounded
    choice: Choice
    calibration: Calibration


def decide(job: Job, scheme: Scheme, folder: Path, progress: Progress) -> Rounded:
    """Choose the layers that stay float, and write the graph with Q/DQ nodes into `folder`.

    Raises ValuesError where more layers than `MOST_FLOAT` would have to stay float.
    """
    import torch

    from sdkd.models.bundle_modules import module_of
    from sdkd.quantization.calibration import Calibration
    from sdkd.quantization.fake import unet_scales
    from sdkd.quantization.sensitivity import choose

    calibration = Calibration.load(calibration_file(Path(job.bundle)))
    unet = module_of(Bundle.open(job.bundle), "unet")
    scales = unet_scales(unet, calibration, scheme)
    most = int(MOST_FLOAT * len(scales))
    with torch.inference_mode():
        choice = choose(unet, calibration.calls, scales, scheme, LIMIT, most, progress)
    if not choice.holds:
        worst = max(error for _, error in choice.after)
        raise ValuesError(
            f"{job.precision} of this UNet is {worst:.2g} (relative) from its float noise prediction, more than "
            f"{LIMIT:g}, with {len(choice.float_layers)} of {len(scales)} layers in float: use half precision, "
            f"calibrate with more images, or train it with --quantize {job.precision} of sdkd distill"
        )
    kept = {name: scale for name, scale in scales.items() if name not in choice.float_layers}
    return Rounded(*write_graph(Path(job.onnx), kept, scheme, folder), choice, calibration)


def graph_weights(onnx: Path) -> dict[str, np.ndarray]:
    """`layer_weights` of an exported graph."""
    import onnx as library

    return layer_weights(library.load(onnx, load_external_data=False), onnx.parent)


def write_graph(onnx: Path, scales: Mapping[str, Any], scheme: Scheme, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A graph with Q/DQ nodes and its weights, in `folder`; and the layers that are rounded."""
    import onnx as library

    from sdkd.quantization.graph import quantize_graph, save_quantized

    model = library.load(onnx, load_external_data=False)
    layers = quantize_graph(model, onnx.parent, scales, scheme)
    folder.mkdir(parents=True, exist_ok=True)
    save_quantized(model, onnx.parent, file := folder / "model.onnx")
    return file, layers


def build_rounded(job: Job, build: Builder, floats: Floats, progress: Progress) -> tuple[Built, dict[str, Any]]:
    """A UNet's engine of eight bits and what was found out about it; see the module.

    `floats` builds the engine in the target's half precision. The second is part of the record's flags.
    Raises ValuesError where the engine is too far off.
    """
    scheme = Scheme(**job.flags[QUANTIZATION]["scheme"])
    rounded = decide(job, scheme, Path(job.folder) / ROUNDED, within(progress, 0.0, 0.4))
    built = build(replace(job, onnx=str(rounded.graph)), within(progress, 0.4, 0.6))
    run, choice = built.run, rounded.choice
    found: dict[str, Any] = {
        "rounded_layers": len(rounded.layers),
        "float_layers": {**_kept(rounded.calibration.layers), **choice.float_layers},
        "sensitivity": {name: float(error) for name, error in choice.sensitivity.items()},
        "quality": {"simulated": _rows(choice.after), "engine": None, "image_psnr_db": None, "limit": LIMIT},
        "speed": None,
    }
    if run is None:
        return built, found
    progress("comparing with the float graph at several timesteps", 0.65)
    calls = rounded.calibration.calls
    rows = prediction_rows(job, run, calls)
    found["parity"] = verdict(
        job, rows, [f"timestep {call.timestep:g}" for call in calls], LIMIT, "half precision here"
    )
    found["parity"]["shapes"] = [shape_words(job, job.checks[0])]
    errors = [(call.timestep, row["relative"]) for call, row in zip(calls, rows, strict=True)]
    progress("comparing whole images", 0.7)
    found["quality"] |= {"engine": _rows(errors), "image_psnr_db": image_psnr(job, run, rounded.calibration)}
    found["speed"] = speed(job, run, floats, within(progress, 0.8, 1.0))
    return built, found


def _kept(layers: Iterable[str]) -> dict[str, str]:
    """The layers that always stay float, and why."""
    return {name: reason for name in layers if (reason := kept_reason(name)) is not None}


# What a target's kernels take: rows, not branches.
SCHEMES: dict[tuple[str, str], Scheme] = {
    ("openvino", "int8"): Scheme("u8"),
    ("onnxruntime", "int8"): Scheme("u8", outputs=True),
    **dict.fromkeys((("tensorrt", "int8"), ("tensorrt-rtx", "int8")), Scheme("s8")),
    **dict.fromkeys((("tensorrt", "fp8"), ("tensorrt-rtx", "fp8")), Scheme("e4m3")),
}
LIGHT = Scheme("none")
# Components whose weights alone are rounded, by target; the others stay float, and why.
ROUNDED_WEIGHTS = {"openvino": TEXT_ENCODERS}
STAYS_FLOAT = {
    **dict.fromkeys(
        TEXT_ENCODERS, "once an image; only OpenVINO multiplies int8 weights without making them float first"
    ),
    "vae_decoder": "its convolutions gain nothing from int8 weights, and what they are given is the image itself",
    "vae_encoder": "its convolutions gain nothing from int8 weights, and what they are given is the image itself",
    "unet_cached": "a single layer, which carries the details between whole steps",
}


def scheme_for(target: str, precision: str) -> Scheme:
    """How a UNet is rounded for a target here: with seven bits where the CPU's sums overflow with eight."""
    scheme = SCHEMES[target, precision]
    return scheme if check_target(target).runs_on_gpu else replace(scheme, weight_bits=weight_bits(cpu_flags()))


def build_light(job: Job, build: Builder, floats: Floats, progress: Progress) -> tuple[Built, dict[str, Any]]:
    """An engine whose linear layers have int8 weights and float arithmetic; in half precision where that is too far
    off, which the second part says.
    """
    from sdkd.quantization.scheme import LayerScales

    scales = {name: LayerScales(1.0) for name in graph_weights(Path(job.onnx))}
    scheme = Scheme(**job.flags[QUANTIZATION]["scheme"])
    graph, _ = write_graph(Path(job.onnx), scales, scheme, Path(job.folder) / ROUNDED)
    built = build(replace(job, onnx=str(graph)), within(progress, 0.0, 0.6))
    if built.run is None:
        return built, {}
    try:
        return built, {"parity": check_engine(job, built.run, within(progress, 0.6, 1.0))}
    except ValuesError as error:
        kept = floats(job, Path(job.folder))
        return kept, {"precision": kept.flags["precision"], "stays_float": str(error)}


def _rows(errors: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    return [{"timestep": float(timestep), "relative": float(error)} for timestep, error in errors]
