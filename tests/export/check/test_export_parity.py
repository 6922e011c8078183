"""The gate: planted faults are caught at their stage, with every finding; right graphs pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import tiny_text_encoder
from onnx import numpy_helper
from small_exports import references, small_graph, small_pipeline

from export.check.parity import Case, Reference, check_graph, check_references, check_values, parity_cases
from sdkd.core.components import vae_decoder_contract
from sdkd.errors import AxesError, NamesError, ParityError, ShapesError, ValuesError
from sdkd.families import STABLE_DIFFUSION
from sdkd.models.exportable import module_config

ENCODER = "text_encoder"


def check(file: Path, component: str = ENCODER) -> dict[str, Any]:
    """The gate on a float32 graph file."""
    module, _, contract, _ = small_graph(component)
    return check_graph(file, contract, references(module, contract), "fp32")


@pytest.mark.parametrize("component", STABLE_DIFFUSION.components)
def test_right_graphs_pass_at_batches_timesteps_and_shapes_they_were_not_traced_with(component: str) -> None:
    figures = check(small_graph(component)[3], component)
    assert figures["relative"] < 1e-5
    assert figures["cosine"] > 1 - 1e-9
    assert figures["finite"] is True
    assert [case["batch"] for case in figures["cases"]] == [1, 2, 3]
    assert [case["timestep"] for case in figures["cases"]] == [1.0, 500.5, 999.0]
    assert figures["runtime"].startswith("onnxruntime 1.")


def test_cases_have_two_shapes_and_none_is_square() -> None:
    _, _, contract, _ = small_graph("unet")
    cases = parity_cases(contract, module_config(small_pipeline().unet))
    sizes = [(case.sizes["height"], case.sizes["width"]) for case in cases]
    assert len(set(sizes)) == 3
    assert all(height != width and not height % 2 and not width % 2 for height, width in sizes)
    assert str(cases[0]) == "batch 1, height 6, width 10, sequence 2"


def renamed(graph: Any) -> None:
    graph.output[1].name = "pooled"


def renamed_twice(graph: Any) -> None:
    graph.input[0].name, graph.output[0].name = "ids", "hidden"


def other_dtype(graph: Any) -> None:
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32


def static_axis(graph: Any) -> None:
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def baked_size(graph: Any) -> None:
    """The hidden states go on as [2, ...], whatever the batch is."""
    output = graph.output[0]
    for node in graph.node:
        node.output[:] = ["inner" if name == output.name else name for name in node.output]
        node.input[:] = ["inner" if name == output.name else name for name in node.input]
    graph.initializer.append(numpy_helper.from_array(np.array([2, -1, 32]), "baked"))
    graph.node.append(onnx.helper.make_node("Reshape", ["inner", "baked"], [output.name]))


def scaled(name: str, factor: float) -> Any:
    def change(graph: Any) -> None:
        tensor = next(row for row in graph.initializer if row.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def unknown_operator(graph: Any) -> None:
    graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (renamed, NamesError, "outputs are last_hidden_state, pooled instead of last_hidden_state, pooler"),
        (renamed_twice, NamesError, r"inputs are ids instead of input_ids; outputs are hidden, pooler_output"),
        (other_dtype, NamesError, "input_ids is int32 instead of int64"),
        (static_axis, AxesError, r"input_ids has axes \[2, sequence\] instead of \[batch, sequence\]; last_hid"),
        (baked_size, ShapesError, r"at batch 1, sequence 2 .*; at batch 3, sequence 77 "),
        (scaled("final_layer_norm.weight", 1.001), ValuesError, "does not compute what PyTorch does"),
        (scaled("final_layer_norm.weight", np.nan), ValuesError, "the graph gives NaN or infinity, PyTorch does not"),
        (unknown_operator, ParityError, r"onnxruntime does not open edited\.onnx \(.*NoSuchOperator"),
    ],
)
def test_a_graph_that_is_wrong_is_refused_by_its_stage(tmp_path: Path, change: Any, error: Any, message: str) -> None:
    model = onnx.load(small_graph(ENCODER)[3])
    change(model.graph)
    onnx.save(model, tmp_path / "edited.onnx")
    with pytest.raises(error, match=message):
        check(tmp_path / "edited.onnx")


def test_weights_of_another_seed_are_a_values_error() -> None:
    _, _, contract, file = small_graph(ENCODER)
    other = tiny_text_encoder(seed=99)
    with pytest.raises(ValuesError, match=r"last_hidden_state at batch 1.*max error .* more than 0\.0003 of"):
        check_graph(file, contract, references(other, contract), "fp32")


def test_nan_weights_in_the_model_itself_are_a_values_error() -> None:
    _, _, contract, _ = small_graph(ENCODER)
    broken = tiny_text_encoder(seed=2)
    broken.final_layer_norm.bias.data[0] = float("nan")
    with pytest.raises(ValuesError, match="PyTorch itself gives NaN or infinity in float32"):
        check_references(contract, references(broken, contract), "fp32")


CONTRACT = vae_decoder_contract({"latent_channels": 4, "out_channels": 3, "block_out_channels": (8, 16)}, "fp32")


def one_case(exact: torch.Tensor, eager: torch.Tensor) -> Reference:
    """A comparison of one made-up output."""
    return Reference(Case({"batch": 1}, 1.0, 1), (), (exact,), (eager,))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_is_judged_by_eager_half(precision: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000, generator=generator)
    noise = 0.02 * torch.randn(1000, generator=generator)
    reference = one_case(exact, exact + noise)
    figures = check_values(CONTRACT, [reference], [(exact - noise,)], precision)
    assert figures["rms"] == pytest.approx(figures["eager_rms"], rel=1e-4)
    with pytest.raises(ValuesError, match=rf"sample at batch 1: .* more than 1\.5 times eager {precision}'s"):
        check_values(CONTRACT, [reference], [(exact + 4 * noise,)], precision)


def test_overflow_of_eager_half_is_found_even_when_the_graph_is_finite() -> None:
    exact = torch.ones(4)
    reference = one_case(exact, torch.tensor([1.0, float("inf"), 1.0, 1.0]))
    with pytest.raises(ValuesError, match="PyTorch itself gives NaN or infinity in fp16; export with --precision bf16"):
        check_references(CONTRACT, [reference], "fp16")
    with pytest.raises(ValuesError, match="more than"):  # and could not pass for a limit
        check_values(CONTRACT, [one_case(exact, torch.full((4,), float("nan")))], [(exact,)], "fp16")
