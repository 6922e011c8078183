"""The traced program of the hand-written UNet (`graph_bundles`), so that its bundle can be compiled by PyTorch, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from export.graph.components import dynamic_shapes, example_inputs, example_sizes
from export.graph.twins import trace
from sdkd.bundle.manifest import Bundle, FileRecord
from sdkd.bundle.onnx_weights import SAME, TRANSFORMS_FILE, torch_weights
from sdkd.bundle.program import PROGRAM_FILE, save_program
from sdkd.core.files import write_json
from sdkd.targets import native_code

WEIGHTS = ("conv", "to_out")


class GraphUNet(nn.Module):
    """What `graph_bundles._unet` computes."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        weights: Any = self
        timed = functional.conv2d(sample, weights.conv, padding=1) * (timestep.to(sample.dtype) * 1e-3)
        return (timed + (encoder_hidden_states.mean(1) @ weights.to_out)[:, :, None, None],)


class Graph(nn.Module):
    """A component's module where the exporter puts it: under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)


def with_program(bundle: Bundle, module: nn.Module | None = None) -> Bundle:
    """The bundle with the program of its UNet, as an export by this user writes it; `module`: another than its own."""
    record, root = bundle.component("unet"), bundle.path
    file = root / "unet" / "model.onnx"
    write_json(file.with_name(TRANSFORMS_FILE), dict.fromkeys(WEIGHTS, SAME))
    weights = torch_weights(file, WEIGHTS)
    contract, config = record.contract, bundle.config("unet")
    inputs = example_inputs(contract, example_sizes(contract, config))
    program = trace(Graph(module or GraphUNet(weights)), inputs, (dynamic_shapes(contract, config),))
    save_program(program, program_file := root / "unet" / PROGRAM_FILE)
    kept = FileRecord.of(root, program_file)
    native_code.note([kept.sha256])
    components = {**bundle.manifest.components, "unet": replace(record, program=kept)}
    changed = Bundle(root, replace(bundle.manifest, components=components))
    changed.save()
    return changed
