"""Bundles of hand-written ONNX graphs that keep the contract: real files for every target, written in milliseconds.

The smallest Stable Diffusion shape that there is: two UNet levels, two pixels per latent, images of 32x32 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdkd.bundle.manifest import Bundle, ComponentRecord, FileRecord, Manifest
from sdkd.core.components import component_contract
from sdkd.core.contract import Contract, Precision
from sdkd.families import STABLE_DIFFUSION

VAE = {"block_out_channels": [8, 16], "latent_channels": 4, "in_channels": 3, "out_channels": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 32, "max_position_embeddings": 77},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 32,
        "sample_size": 16,
        "block_out_channels": [16, 32],
    },
    "vae_decoder": VAE,
    "vae_encoder": VAE,
}
NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}


class Graph:
    """Nodes and weights under construction."""

    def __init__(self, precision: Precision) -> None:
        self.dtype: Any = NUMPY[precision]
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int, scale: float = 0.2) -> str:
        values = (scale * self.random.standard_normal(shape)).astype(self.dtype)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def _unet(g: Graph) -> None:
    g.add("Conv", ["sample", g.weight("conv", 4, 4, 3, 3)], "mixed", pads=[1, 1, 1, 1])
    g.add("Cast", ["timestep"], "time", to=helper.np_dtype_to_tensor_dtype(np.dtype(g.dtype)))
    g.add("Mul", ["time", g.constant("scale", np.array(1e-3, g.dtype))], "scaled")
    g.add("Mul", ["mixed", "scaled"], "timed")
    g.add("ReduceMean", ["encoder_hidden_states", g.constant("axes", [1])], "pooled", keepdims=0)
    g.add("MatMul", ["pooled", g.weight("to_out", 32, 4)], "context")
    g.add("Unsqueeze", ["context", g.constant("spatial", [2, 3])], "bias")
    g.add("Add", ["timed", "bias"], "out_sample")


def _vae_decoder(g: Graph) -> None:
    g.add("Conv", ["latent_sample", g.weight("conv", 12, 4, 3, 3)], "mixed", pads=[1, 1, 1, 1])
    g.add("DepthToSpace", ["mixed"], "sample", blocksize=2)


def _vae_encoder(g: Graph) -> None:
    g.add("Conv", ["sample", g.weight("conv", 8, 3, 2, 2)], "latent_parameters", strides=[2, 2])


def _text_encoder(g: Graph) -> None:
    g.add("Gather", [g.weight("embedding", 600, 32, scale=1.0), "input_ids"], "last_hidden_state")
    g.add("ReduceMean", ["last_hidden_state", g.constant("axes", [1])], "pooler_output", keepdims=0)


BODIES = {"text_encoder": _text_encoder, "unet": _unet, "vae_decoder": _vae_decoder, "vae_encoder": _vae_encoder}


def graph_model(component: str, precision: Precision) -> onnx.ModelProto:
    """A component's graph, opset 18."""
    contract: Contract = component_contract(component, CONFIGS[component], precision)
    g = Graph(precision)
    BODIES[component](g)

    def infos(specs: Any) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(s.name, ONNX_TYPES[s.dtype], list(s.axes)) for s in specs]

    graph = helper.make_graph(g.nodes, component, infos(contract.inputs), infos(contract.outputs), g.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def write_component(root: Path, component: str, model: onnx.ModelProto, precision: Precision) -> ComponentRecord:
    """Write a graph with its weights beside it, and return its record."""
    folder = root / component
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[component]))
    file = folder / "model.onnx"
    file.with_name("model.onnx.data").unlink(missing_ok=True)
    onnx.save_model(
        model,
        str(file),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=100,
        convert_attribute=False,
    )
    files = tuple(FileRecord.of(root, path) for path in (file, file.with_name("model.onnx.data")))
    contract = component_contract(component, CONFIGS[component], precision)
    return ComponentRecord(component, contract, precision, 18, files, "0" * 64, 1000, 0.1)


def graph_bundle(
    root: Path, precision: Precision = "fp32", components: tuple[str, ...] = STABLE_DIFFUSION.components
) -> Bundle:
    """A bundle of all four components."""
    records = {name: write_component(root, name, graph_model(name, precision), precision) for name in components}
    bundle = Bundle(root, Manifest({"model": "graphs"}, {}, records))
    bundle.save()
    return bundle


def replace_component(bundle: Bundle, component: str, model: onnx.ModelProto) -> Bundle:
    """The bundle with another graph for one component, recorded as an export would."""
    bundle = Bundle.open(bundle.path)
    old = bundle.component(component)
    record = write_component(bundle.path, component, model, old.precision)  # type: ignore[arg-type]
    components = {**bundle.manifest.components, component: record}
    changed = Bundle(bundle.path, Manifest(bundle.manifest.source, {}, components, bundle.manifest.engines))
    changed.save()
    return changed


def ending(bundle: Bundle, operator: str, output: int | None = None, name: str = "", **attributes: Any) -> Bundle:
    """The bundle with one more operator at the end of its UNet; `output`: the graph's type after it, as in ONNX."""
    model = graph_model("unet", bundle.component("unet").precision)  # type: ignore[arg-type]
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node(operator, ["before"], ["out_sample"], name=name, **attributes))
    if output is not None:
        model.graph.output[0].type.tensor_type.elem_type = output
    return replace_component(bundle, "unet", model)


def unknown_operator(bundle: Bundle) -> Bundle:
    """The bundle with an operator in its UNet that no library has."""
    model = graph_model("unet", bundle.component("unet").precision)  # type: ignore[arg-type]
    model.graph.node[0].op_type, model.graph.node[0].name = "Convolve", "down_blocks.0"
    return replace_component(bundle, "unet", model)
