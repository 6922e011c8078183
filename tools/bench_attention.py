"""Forms of attention in ONNX Runtime on the CPU at SD 1.5's shapes for 512 px: the same numbers, in turn, samples kept.

    python tools/bench_runtime.py --pieces attention

Attention            one node of opset 23, between split into heads and joining, as the exporter writes it
MatMul and Softmax   the same at opset 18
MultiHeadAttention   ONNX Runtime's own node, which `sdkd.targets.ort_attention` puts in the place of the first
PyTorch              scaled_dot_product_attention
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from sdkd.compare.measure.stats import speedup

HEADS, BATCH, ROUNDS = 8, 2, 7
SHAPES = ((4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (1024, 77, 80), (256, 256, 160))  # queries, keys, width
BASE = "Attention (opset 23)"
SWAP = [0, 2, 1, 3]


def graph(form: str, width: int) -> bytes:
    """q, k, v [batch, tokens, heads x width] to out, as one of the forms."""
    from onnx import TensorProto, helper

    from sdkd.targets.ort_attention import fuse_attention

    made, opset = helper.make_node, 18 if form.startswith("MatMul") else 23
    nodes = [
        node
        for name in "qkv"
        for node in (
            made("Reshape", [name, "split"], [f"{name}_heads"]),
            made("Transpose", [f"{name}_heads"], [f"{name}_first"], perm=SWAP),
        )
    ]
    if opset == 18:
        nodes += [
            made("Transpose", ["k_heads"], ["k_last"], perm=[0, 2, 3, 1]),
            made("Mul", ["q_first", "scale"], ["q_scaled"]),
            made("MatMul", ["q_scaled", "k_last"], ["scores"]),
            made("Softmax", ["scores"], ["shares"], axis=-1),
            made("MatMul", ["shares", "v_first"], ["attended"]),
        ]
    else:
        nodes += [made("Attention", ["q_first", "k_first", "v_first"], ["attended"], scale=width**-0.5)]
    nodes += [made("Transpose", ["attended"], ["back"], perm=SWAP), made("Reshape", ["back", "joined"], ["out"])]
    constants = [
        helper.make_tensor("split", TensorProto.INT64, [4], [0, -1, HEADS, width]),
        helper.make_tensor("joined", TensorProto.INT64, [3], [0, -1, HEADS * width]),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [width**-0.5]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", name, HEADS * width]) for name in "qkv"]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        helper.make_graph(nodes, "attention", ends, [out], constants), opset_imports=opsets, ir_version=10
    )
    if form == "MultiHeadAttention" and fuse_attention(model) != 1:
        raise SystemExit("the graph's attention was not recognised")
    found: bytes = model.SerializeToString()
    return found


def calls(feeds: Mapping[str, np.ndarray], width: int) -> dict[str, Callable[[], np.ndarray]]:
    """Every form on these tensors."""
    import onnxruntime
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    found: dict[str, Callable[[], np.ndarray]] = {}
    for form in (BASE, "MatMul and Softmax (opset 18)", "MultiHeadAttention"):
        session = onnxruntime.InferenceSession(graph(form, width), providers=["CPUExecutionProvider"])
        found[form] = partial(_run, session, feeds)
    tensors = [torch.from_numpy(feeds[name]).unflatten(-1, (HEADS, width)).transpose(1, 2) for name in "qkv"]

    def eager() -> np.ndarray:
        answer: np.ndarray = scaled_dot_product_attention(*tensors).transpose(1, 2).flatten(2).numpy()
        return answer

    return {**found, "PyTorch": eager}


def _run(session: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    answer: np.ndarray = session.run(None, feeds)[0]
    return answer


def measure_attention() -> list[dict[str, Any]]:
    """Seconds of every form at every shape, in rotating order; the forms' results agree, or nothing is said."""
    rows = []
    for queries, keys, width in SHAPES:
        random = np.random.default_rng(0)
        lengths = {"q": queries, "k": keys, "v": keys}
        feeds = {
            name: random.standard_normal((BATCH, length, HEADS * width), dtype=np.float32)
            for name, length in lengths.items()
        }
        ways = calls(feeds, width)
        expected = ways["PyTorch"]()
        for name, call in ways.items():
            np.testing.assert_allclose(call(), expected, atol=1e-4, err_msg=name)
        samples = _in_turn(ways)
        rows += [_row((queries, keys, width), name, samples) for name in ways]
    return rows


def _in_turn(ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            ways[name]()
            samples[name].append(time.perf_counter() - start)
    return samples


def _row(shape: tuple[int, int, int], form: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    ratio = speedup([[one] for one in samples[BASE]], [[one] for one in samples[form]]) if form != BASE else None
    return {
        "queries": shape[0], "keys": shape[1], "width": shape[2], "form": form,
        "seconds": statistics.median(samples[form]),
        "faster": [ratio.value, ratio.low, ratio.high] if ratio else None,
        "samples": samples[form],
    }  # fmt: skip


def attention_lines(rows: list[dict[str, Any]], _: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    lines = [
        f"## Attention in ONNX Runtime: batch {BATCH}, {HEADS} heads, float32",
        "",
        "| queries x keys x width | form | ms | faster than opset 23's |",
        "|---|---|---:|---:|",
    ]
    for row in rows:
        ratio = "{:.2f}x ({:.2f} to {:.2f})".format(*row["faster"]) if row["faster"] else "-"
        shape = f"{row['queries']} x {row['keys']} x {row['width']}"
        lines.append(f"| {shape} | {row['form']} | {row['seconds'] * 1e3:,.1f} | {ratio} |")
    return lines
