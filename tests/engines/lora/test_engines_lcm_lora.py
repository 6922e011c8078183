"""A LoRA as latent-consistency/lcm-lora-sdv1-5 has it, on students: by every way the same weights, no layer lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import delta, lcm_layers, lcm_lora
from safetensors.torch import load_file
from training_runs import fused

from engines import load_pipeline
from engines.modules.components import EngineUNet
from sdkd.demo import load_teacher
from sdkd.distill.remap_cli import run
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.fused import with_loras
from sdkd.models.resolve import load_component, resolve
from sdkd.students.blocks import build_student


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_teacher()


@pytest.fixture(scope="module")
def public(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo's teacher, whose UNet has the layers of SD 1.5's in other widths."""
    return lcm_lora(pipe.unet, tmp_path_factory.mktemp("lcm") / "lcm.safetensors")


@pytest.mark.parametrize("student", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
def test_a_public_lcm_lora_goes_onto_students(
    student: str, pipe: Any, public: Path, engine_bundle: Path, tmp_path: Path
) -> None:
    state, changed = load_file(public), copy.deepcopy(pipe.unet)
    assert len(state) == 3 * 278  # as the published file has them
    for name in lcm_layers(changed):
        changed.get_submodule(name).weight += delta(state, name)
    plain = build_student(pipe.unet, student).requires_grad_(False)
    expected = build_student(changed, student).state_dict()

    def agree(found: dict[str, torch.Tensor]) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # the file is in half

    kept = run(public, tmp_path / "lora", student, "demo")
    own = lcm_layers(plain)
    assert (kept["made_for"], kept["kept"], kept["removed"]) == ("teacher", 2 * len(own), 2 * (278 - len(own)))
    names = {name.removeprefix("unet.").rpartition(".lora_")[0] for name in load_file(kept["output"])}
    assert names == set(own)
    assert max((expected[name] - value).abs().max() for name, value in plain.state_dict().items()) > 0.01

    write_pipeline(pipe, tmp_path / "student", unet=plain)
    agree(load_component(with_loras(resolve(tmp_path / "student"), [tmp_path / "lora"]), "unet").state_dict())
    eager = type(pipe)(**(pipe.components | {"unet": copy.deepcopy(plain)}), requires_safety_checker=False)
    agree(fused(eager, tmp_path / "lora").state_dict())
    session = load_pipeline(engine_bundle, "onnxruntime").unet.session  # never run: what is added to it counts
    eager.unet = EngineUNet(session, plain.config, torch.float32, torch.device("cpu"))
    for file in (public, tmp_path / "lora"):  # the engine's own layer map, and the file that was made to fit
        eager.load_lora_weights(file)
        added = {name: find() for name, find in eager.unet.weights._wanted.deltas.items()}
        assert {name.removesuffix(".weight") for name in added} == set(own)
        agree({name: value + added.get(name, 0) for name, value in plain.state_dict().items()})
        eager.unload_lora_weights()
