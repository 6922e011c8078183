"""Sinusoids of timesteps in float32 while OpenVINO computes in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundles import small_modules
from small_exports import small_bundle, variant_bundle

from sdkd.targets.openvino_timesteps import keep_timesteps
from sdkd.targets.registry import cpu_precisions, openvino_core

pytest.importorskip("openvino")

TIMESTEPS = (981.0, 500.5, 1.0)


@pytest.fixture(scope="module")
def graphs() -> Path:
    return small_bundle().path


def opened(graphs: Path, component: str = "unet") -> Any:
    return openvino_core().read_model(graphs / component / "model.onnx")


def feeds(timestep: float, batch: int = 2) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    return {
        "sample": generator.standard_normal((batch, 4, 16, 24)).astype(np.float32),
        "timestep": np.array(timestep, np.float32),
        "encoder_hidden_states": generator.standard_normal((batch, 77, 32)).astype(np.float32),
    }


def run(compiled: Any, given: Mapping[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = compiled(dict(given))["out_sample"]
    return found.copy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compiled(model: Any, hint: str) -> Any:
    return openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})


def test_the_graph_computes_what_it_did(graphs: Path) -> None:
    model = opened(graphs)
    before = compiled(model, "f32")
    assert keep_timesteps(openvino_core(), model) == 2  # a sine and a cosine
    assert keep_timesteps(openvino_core(), opened(variant_bundle("embedded"))) == 2
    after = compiled(model, "f32")
    for timestep, batch in zip(TIMESTEPS, (1, 3, 3), strict=True):
        given = feeds(timestep, batch)
        assert error(run(after, given), run(before, given)) < 1e-5


def test_a_graph_without_timesteps_stays_as_it_is(graphs: Path) -> None:
    model = opened(graphs, "vae_decoder")
    names = [node.get_friendly_name() for node in model.get_ops()]
    assert keep_timesteps(openvino_core(), model) == 0
    assert [node.get_friendly_name() for node in model.get_ops()] == names


def test_sinusoids_of_another_input_stay_as_they_are() -> None:
    import openvino as ov
    import openvino.opset13 as ops

    timestep = ops.parameter([], np.float32, name="timestep")
    other = ops.parameter([2, 1], np.float32, name="other")
    timestep.output(0).set_names({"timestep"})
    angles = ops.multiply(other, ops.constant(np.ones((1, 4), np.float32)))
    model = ov.Model([ops.add(ops.sin(angles), timestep)], [timestep, other])
    assert keep_timesteps(openvino_core(), model) == 0


@pytest.mark.skipif("bf16" not in cpu_precisions(), reason="this CPU has no bf16 units")
def test_in_bf16_early_timesteps_are_as_close_as_late_ones(graphs: Path) -> None:
    core, plain, kept = openvino_core(), compiled(opened(graphs), "bf16"), opened(graphs)
    keep_timesteps(core, kept)
    made = compiled(kept, "bf16")
    saved = core.import_model(made.export_model().getvalue(), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    unet = small_modules()["unet"]
    rounded = copy.deepcopy(unet).to(torch.bfloat16)
    errors: dict[str, list[float]] = {"plain": [], "kept": [], "saved": [], "eager": []}
    for timestep in TIMESTEPS:
        given = feeds(timestep)
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        with torch.inference_mode():
            expected = unet(**tensors).sample.numpy()
            half = {name: value.bfloat16() if value.ndim else value for name, value in tensors.items()}
            errors["eager"].append(error(rounded(**half).sample.float().numpy(), expected))
        for name, one in (("plain", plain), ("kept", made), ("saved", saved)):
            errors[name].append(error(run(one, given), expected))
    assert errors["kept"] == errors["saved"]
    for mine, eager in zip(errors["kept"], errors["eager"], strict=True):
        assert mine < 1.25 * eager
    assert errors["plain"][0] > 2 * errors["kept"][0]
