"""Tracing and translating at half of the cost: twins of operators, programs that are not decomposed."""

from __future__ import annotations

import gc
import pkgutil
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from export.graph import to_onnx as exporter
from export.graph.quick_program import QuickProgram, is_functional, without_repeats
from export.graph.twins import Twins, trace
from sdkd.core.collection import paused_gc
from sdkd.core.contract import Contract, TensorSpec

ROWS = TensorSpec("sample", "float32", ("batch", 16))


class Everything(nn.Module):
    """Each operator that has a twin, a cast, and reshapes of which one changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group, self.layer, self.linear = nn.GroupNorm(4, 16), nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 24]."""
        rows = self.group(sample).reshape(sample.shape).reshape(-1, 2, 8)
        heads = self.layer(rows.double().float()).unsqueeze(1)
        return self.linear(functional.scaled_dot_product_attention(heads, heads, heads)).mean(dim=(1, 2))


def program_of(module: nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=63)
    return trace(module.eval(), inputs, tuple({0: batch} for _ in inputs))


def contract_of(*inputs: TensorSpec, width: int) -> Contract:
    return Contract("unet", inputs, (TensorSpec("out_sample", "float32", ("batch", width)),))


def answer(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    import onnx_ir as ir

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.group_norm(x, 2, x.new_ones(4), x.new_zeros(4)),
        lambda x: functional.group_norm(x, num_groups=2),
        lambda x: functional.layer_norm(x, (6, 8), eps=1e-6),
        lambda x: functional.linear(x, x.new_ones(5, 8)),
        lambda x: functional.linear(x, x.new_ones(5, 8), bias=x.new_ones(5)),
        lambda x: functional.scaled_dot_product_attention(x, x[:, :, :2], x[:, :, :2, :3]),
        lambda x: functional.scaled_dot_product_attention(x, x, x, scale=0.5, is_causal=True),
    ],
)
def test_a_twin_says_the_shape_and_dtype_of_its_operator(
    call: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    with FakeTensorMode(), torch.no_grad():
        tensor = torch.empty(3, 4, 6, 8, dtype=dtype)
        wanted = call(tensor)
        with Twins():
            found = call(tensor)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


def test_a_traced_program_has_no_twins_and_computes_what_the_module_does() -> None:
    module, sample = Everything().eval(), torch.randn(5, 16)
    program = program_of(module, torch.randn(2, 16))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in targets if name.startswith("sdkd")]
    assert targets >= {f"aten.{name}.default" for name in ("group_norm", "layer_norm", "linear")}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(sample), module(sample), rtol=0, atol=0)


def test_a_quick_program_loses_steps_that_change_nothing_and_keeps_the_values() -> None:
    module, sample = Everything().eval(), torch.randn(5, 16)
    program = program_of(module, torch.randn(2, 16))
    quick = QuickProgram(program)
    assert quick.run_decompositions({}) is quick
    names = [str(node.target) for node in quick.graph.nodes if node.op == "call_function"]
    assert names.count("aten._to_copy.default") == 2
    assert names.count("aten.reshape.default") == 1
    assert not [name for name in names if name.startswith("aten.to.")]
    model = exporter._to_ir(quick, contract_of(ROWS, width=24), 23)
    with torch.no_grad():
        torch.testing.assert_close(answer(model, sample=sample), module(sample), rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
    """Adds integers to floats, which ONNX does not."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """[batch, 16]."""
        return (sample + torch.arange(16)) * 2


def test_operands_are_promoted_without_running_the_graph_again() -> None:
    place = "torch.onnx._internal.fx.passes.type_promotion:_TypePromotionInterpreter"
    library = "torch.onnx._internal._lazy_import:onnxscript_apis.get_torchlib_ops"
    before = pkgutil.resolve_name(place)
    with without_repeats():
        assert issubclass(pkgutil.resolve_name(place), before)
        assert pkgutil.resolve_name(place) is not before
        assert pkgutil.resolve_name(library)() is pkgutil.resolve_name(library)()
    assert pkgutil.resolve_name(place) is before
    sample = torch.randn(3, 16)
    with exporter.silence():
        model = exporter._quickly(program_of(Mixed(), sample), contract_of(ROWS, width=16), 23)
    torch.testing.assert_close(answer(model, sample=sample), Mixed()(sample))


class Shrink(nn.Module):
    """An operator that has no ONNX translation, but a decomposition."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """[batch, 16]."""
        return functional.hardshrink(sample, 0.5)


def test_a_program_without_a_translation_is_no_quick_one() -> None:
    program = program_of(Shrink(), torch.randn(3, 16))
    assert is_functional(program)
    with exporter.silence():
        assert exporter._quickly(program, contract_of(ROWS, width=16), 23) is None


class InPlace(Shrink):
    """Writes into a tensor of its own, too."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """[batch, 16]."""
        return super().forward(sample.clone().mul_(2.0))


def test_what_must_be_decomposed_is() -> None:
    sample = torch.randn(3, 16)
    program = program_of(InPlace(), sample)
    assert not is_functional(program)
    with exporter.silence():
        assert exporter._quickly(program, contract_of(ROWS, width=16), 23) is None
        model = exporter._translate(program, contract_of(ROWS, width=16), 23)
    torch.testing.assert_close(answer(model, sample=sample), functional.hardshrink(2 * sample, 0.5))


def stop_in_a_pause() -> None:
    with paused_gc():
        assert not gc.isenabled()
        raise RuntimeError("stopped")


def test_a_pause_of_the_collector_ends_with_its_block() -> None:
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stopped"):
        stop_in_a_pause()
    assert gc.isenabled()
