"""Sinusoids of timesteps stay in float32 where OpenVINO computes a UNet in half precision.

Told to compute in bfloat16, OpenVINO's CPU plugin rounds the timestep, too: 981 becomes 980, and the angle of its
fastest sinusoid is wrong by a radian. diffusers computes them in float32 in any precision (`get_timestep_embedding`).
The plugin leaves an operator alone that has the attribute DisablePrecisionConversion (from 2026.4 on), which is read
from a model's XML and can't be set from Python. So the two operators come from an XML of their own.
"""

from __future__ import annotations

from typing import Any

FLOAT32 = "float32"
HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}  # INFERENCE_PRECISION_HINT by precision
TIMESTEP = "timestep"
WAVES = ("Sin", "Cos")
VIEWS = ("Broadcast", "Convert", "Reshape", "Squeeze", "Unsqueeze")  # that make a column of the scalar

PORT = '<port id="{id}" precision="FP32">{dims}</port>'
KEPT = '<rt_info><attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16"/></rt_info>'
MATRIX = "<dim>-1</dim><dim>-1</dim>"
TEMPLATE = """<?xml version="1.0"?>
<net name="wave" version="11"><layers>
<layer id="0" name="timestep" type="Parameter" version="opset1"><data shape="" element_type="f32"/>
<output>{scalar}</output></layer>
<layer id="1" name="frequencies" type="Parameter" version="opset1"><data shape="?,?" element_type="f32"/>
<output>{first}</output></layer>
<layer id="2" name="{name}/angles" type="Multiply" version="opset1"><data auto_broadcast="numpy"/>{kept}
<input>{scalar}{second}</input><output>{third}</output></layer>
<layer id="3" name="{name}/float32" type="{wave}" version="opset1">{kept}
<input>{first}</input><output>{second}</output></layer>
<layer id="4" name="result" type="Result" version="opset1"><input>{first}</input></layer>
</layers><edges>
<edge from-layer="0" from-port="0" to-layer="2" to-port="0"/>
<edge from-layer="1" from-port="0" to-layer="2" to-port="1"/>
<edge from-layer="2" from-port="2" to-layer="3" to-port="0"/>
<edge from-layer="3" from-port="1" to-layer="4" to-port="0"/>
</edges></net>"""


def keep_timesteps(core: Any, model: Any) -> int:
    """Let a model's sinusoids of its scalar input `timestep` be computed in float32; how many it found.

    `model`: an openvino.Model, changed in place; without such an input, or with sinusoids of another form, it stays as
    it is.
    """
    timestep = next((port for port in model.inputs if TIMESTEP in port.names), None)
    if timestep is None or timestep.partial_shape.rank.get_length():
        return 0
    waves = [node for node in model.get_ops() if node.get_type_name() in WAVES]
    found = [(wave, *factors) for wave in waves if (factors := _factors(wave, timestep))]
    for wave, frequencies, column in found:
        wave.output(0).replace(_in_float32(core, wave, timestep, frequencies, column))
    if found:
        model.validate_nodes_and_infer_types()
    return len(found)


def _factors(wave: Any, timestep: Any) -> tuple[Any, Any] | None:
    """Frequencies and the column of timesteps whose product is a sinusoid's angle; None where it is another's."""
    angles = wave.input_value(0).get_node()
    if angles.get_type_name() != "Multiply":
        return None
    ports = [angles.input_value(0), angles.input_value(1)]
    frequencies, column = sorted(ports, key=lambda port: port.get_node().get_type_name() != "Constant")
    if frequencies.get_node().get_type_name() != "Constant" or _origin(column) != _origin(timestep):
        return None
    return frequencies, column


def _origin(port: Any) -> str:
    """Name of the node that a value comes from, seen through views of it."""
    node = port.get_node()
    while node.get_type_name() in VIEWS:
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name())


def _in_float32(core: Any, wave: Any, timestep: Any, frequencies: Any, column: Any) -> Any:
    """The same sinusoids, [batch, frequencies], of the scalar itself and by operators that keep their precision."""
    import openvino.opset13 as ops

    ports = {"scalar": PORT.format(id=0, dims="")}
    ports |= {name: PORT.format(id=at, dims=MATRIX) for at, name in enumerate(("first", "second", "third"))}
    text = TEMPLATE.format(name=wave.get_friendly_name(), wave=wave.get_type_name(), kept=KEPT, **ports)
    made = core.read_model(text.encode(), b"")
    given = {"timestep": timestep, "frequencies": frequencies}
    for parameter in made.get_parameters():
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(given[parameter.get_friendly_name()])
    (result,) = made.get_results()
    return ops.broadcast(result.input_value(0), ops.shape_of(column), broadcast_spec="BIDIRECTIONAL").output(0)
