"""Target openvino: the graph compiled for this CPU as a blob, or an IR that is compiled where it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from export.build.job import Built, Job, Run, check_io
from sdkd.core.console import Progress
from sdkd.core.contract import QUANTIZED
from sdkd.errors import BuildError, InputError
from sdkd.targets.openvino_shapes import ByShape, Shapes, compiled_for, corners
from sdkd.targets.openvino_timesteps import FLOAT32, HINTS, keep_timesteps
from sdkd.targets.registry import cpu_precisions, openvino_core

if TYPE_CHECKING:
    import numpy as np

DEVICE = "CPU"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32"}


def half_precision() -> str:
    """The fastest float precision of this CPU: bf16 or fp16 where it has units, else fp32."""
    units = cpu_precisions()
    return next((name for name in ("bf16", "fp16") if name in units), "fp32")


def flags(engine_precision: str, onnx_precision: str) -> dict[str, Any]:
    """Options of the build; `config` must be given again when the blob is opened: a blob does not remember it.

    Without it a CPU with bf16 units computes in bf16. `timesteps`: what their sinusoids are computed in where the rest
    is in half precision. Half-precision graphs run in f32 on a CPU without half units, where the hint f16 would mean
    bf16. What is not in eight bits in an int8 engine is in the fastest of them. Raises InputError when bf16 or fp16 is
    asked for and the CPU has none.
    """
    engine_precision = half_precision() if engine_precision in QUANTIZED else engine_precision
    units, hint = cpu_precisions(), HINTS[engine_precision]
    if engine_precision not in units and engine_precision == onnx_precision:
        hint = "f32"
    elif engine_precision not in units:
        raise InputError(
            f"precision {engine_precision!r} needs a CPU with {engine_precision.upper()} units, this one has "
            f"{', '.join(sorted(units)).upper()}: build with --precision {onnx_precision}"
        )
    config = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    return {"config": config} if hint == "f32" else {"config": config, "timesteps": FLOAT32}


def build(job: Job, progress: Progress) -> Built:
    """Compile for the job's shapes and save <component>.blob; or the IR (.xml, .bin).

    The IR where calls have few shapes, for which the session compiles it, and where no blob can be opened.
    """
    core = openvino_core()
    progress("reading the graph", 0.0)
    model = core.read_model(job.onnx)
    check_io(job, _tensors(model.inputs), _tensors(model.outputs))
    (profile,) = job.profiles  # a blob has one range per axis
    model.reshape({name: _partial_shape(shapes) for name, shapes in profile.items()})
    config = dict(job.flags["config"])
    if job.flags.get("timesteps") == FLOAT32:
        keep_timesteps(core, model)
    progress("compiling", 0.1)
    few = corners(profile)
    if few or "EXPORT_IMPORT" not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
        return _save_ir(job, model, config, few)
    compiled = core.compile_model(model, DEVICE, config)
    file = job.file(".blob")
    with file.open("wb") as stream:
        stream.write(compiled.export_model().getvalue())
    del compiled
    progress("opening the saved blob", 0.8)
    opened = ByShape((), lambda _: core.import_model(file.read_bytes(), DEVICE, config))
    return Built((file.name,), {"format": "blob", **_inference(opened.usual(), config)}, run=_runner(opened, job))


def _save_ir(job: Job, model: Any, config: Mapping[str, str], few: Sequence[Shapes]) -> Built:
    import openvino

    core, file = openvino_core(), job.file(".xml")
    openvino.save_model(model, file, compress_to_fp16=False)
    models = ByShape(few, partial(compiled_for, core, core.read_model(file), config))
    found = {"format": "ir", **_inference(models.usual(), config)}
    return Built((file.name, file.with_suffix(".bin").name), found, run=_runner(models, job))


def _inference(compiled: Any, config: Mapping[str, str]) -> dict[str, str]:
    """What the compiled model says it computes in; BuildError when that is not what was asked for."""
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != config["INFERENCE_PRECISION_HINT"]:
        raise BuildError(f"OpenVINO computes in {found}, asked for {config['INFERENCE_PRECISION_HINT']}")
    return {"inference_precision": found}


def _partial_shape(shapes: Sequence[Sequence[int]]) -> Any:
    import openvino

    low, _, high = shapes
    return openvino.PartialShape([openvino.Dimension(a, b) for a, b in zip(low, high, strict=True)])


def _tensors(ports: Sequence[Any]) -> dict[str, str]:
    return {port.get_any_name(): DTYPES.get(port.get_element_type().get_type_name(), "unknown") for port in ports}


def _runner(models: ByShape, job: Job) -> Run:
    names = [spec.name for spec in job.contract.outputs]

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        compiled, _ = models.of({name: array.shape for name, array in feeds.items()})
        result = compiled(dict(feeds))
        return [result[name] for name in names]

    return run
