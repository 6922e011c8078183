"""Attention nodes become ONNX Runtime's own where they may, with the same results, and stay where they may not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from sdkd.targets.ort_attention import fuse_attention

HEADS, WIDTH = 2, 4
SWAP = [0, 2, 1, 3]


def graph(
    *, perm: list[int] = SWAP, extra_inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ("out",), **options: Any
) -> ModelProto:
    """Attention of two heads between its splits and its joining, as the exporter writes them."""
    made = helper.make_node
    nodes = []
    for name in "qkv":
        nodes += [
            made("Reshape", [name, "split"], [f"{name}_heads"]),
            made("Transpose", [f"{name}_heads"], [f"{name}_first"], perm=perm),
        ]
    nodes += [
        made(
            "Attention", ["q_first", "k_first", "v_first", *extra_inputs], ["attended"], name="a/Attention", **options
        ),
        made("Transpose", ["attended"], ["back"], perm=perm),
        made("Shape", ["q"], ["batch"], start=0, end=1),
        made("Concat", ["batch", "rest"], ["joined"], axis=0),
        made("Reshape", ["back", "joined"], ["whole"]),
        made("Neg", ["whole"], ["out"]),
    ]
    constants = {"split": [0, -1, HEADS, WIDTH], "rest": [-1, HEADS * WIDTH]}
    return helper.make_model(
        helper.make_graph(
            nodes,
            "attention",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", name, HEADS * WIDTH]) for name in "qkv"],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [helper.make_tensor(name, TensorProto.INT64, [len(value)], value) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )


def run(model: ModelProto) -> np.ndarray:
    lengths = {"q": 5, "k": 3, "v": 3}
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((2, lengths[name], HEADS * WIDTH), dtype=np.float32) for name in lengths}
    found: np.ndarray = onnxruntime.InferenceSession(model.SerializeToString()).run(["out"], feeds)[0]
    return found


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}])
def test_the_library_s_own_attention_gives_the_same(options: dict[str, Any]) -> None:
    model = graph(**options)
    expected = run(model)
    assert fuse_attention(model) == 1
    assert Counter(node.op_type for node in model.graph.node) == {"MultiHeadAttention": 1, "Neg": 1}
    assert model.graph.node[0].name == "a/Attention"
    np.testing.assert_allclose(run(model), expected, atol=1e-6)
    assert fuse_attention(model) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": 1},
        {"softcap": 2.0},
        {"perm": [0, 1, 2, 3]},
        {"extra_inputs": ("mask",)},
        {"outputs": ("out", "attended")},
        {"outputs": ("out", "back")},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_what_is_more_than_plain_attention_is_left_alone(changes: dict[str, Any]) -> None:
    model = graph(**changes)
    before = model.SerializeToString()
    assert fuse_attention(model) == 0
    assert model.SerializeToString() == before
