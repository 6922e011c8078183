"""`sdkd remap-lora`: every style of names, and settings that differ from module to module."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from training_runs import fused, same, sdkd, teacher, unet_output, weights

from sdkd.distill.remap_cli import run
from sdkd.distill.training.lora import add_lora, save_lora
from sdkd.errors import InputError, OutputExistsError
from sdkd.students.blocks import build_student, key_map
from sdkd.students.lora_file import FILE, read_lora
from sdkd.students.lora_layers import common_name, remap_settings


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of all targets whose alpha is not its rank, trained on the teacher."""
    unet = helpers.tiny_unet()
    generator = torch.Generator().manual_seed(8)
    for parameter in add_lora(unet, rank=2, alpha=3, targets="all"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return save_lora(unet, tmp_path_factory.mktemp("remap") / "lora")


def test_student_with_it_equals_the_student_of_the_fused_teacher(lora: Path, tmp_path: Path) -> None:
    run(lora, tmp_path, "tiny", str(teacher()))
    found = fused(helpers.tiny_pipeline(student="tiny"), tmp_path)
    expected = build_student(fused(helpers.tiny_pipeline(), lora), "tiny")
    assert same(weights(found), weights(expected))
    assert (unet_output(expected) - unet_output(build_student(helpers.tiny_unet(), "tiny"))).abs().max() > 0.01


def test_the_command_says_what_was_kept(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", "tiny", "--teacher", teacher(), "--json"]
    sdkd("remap-lora", lora, tmp_path / "new.safetensors", *words)
    found = json.loads(capsys.readouterr().out)
    state, settings = read_lora(tmp_path / "new.safetensors")
    assert found["kept"] == len(state) == found["weights"] - found["removed"]
    assert 0 < found["removed"] < found["weights"]
    assert settings["unet.lora_alpha"] == 3
    with pytest.raises(OutputExistsError, match="already exists"):
        run(lora, tmp_path / "new.safetensors", "tiny", str(teacher()))
    with pytest.raises(InputError, match="student 'huge' is unknown"):
        run(lora, tmp_path / "other", "huge", str(teacher()))
    assert not (tmp_path / "other" / FILE).exists()


def test_names_of_all_styles_become_two() -> None:
    wanted = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.lora_A.weight"
    bare = wanted.removeprefix("unet.")
    assert {common_name(prefix + bare) for prefix in ("", "unet.", "base_model.model.", "base_model.model.unet.")} == {
        wanted
    }
    old = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_{}_lora.down.weight"
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{}.lora_A.weight"
    assert common_name(old.format("v")) == layer.format("v")
    assert common_name(old.format("out")) == layer.format("out.0")
    for name in ("lora_unet_mid_block_attentions_0_proj_in.alpha", "text_encoder.text_model.x", "lora_te_y"):
        assert common_name(name) == name
    original = "lora_unet_input_blocks_4_1_proj_in.alpha"
    assert common_name(original) == "lora_unet_down_blocks_1_attentions_0_proj_in.alpha"


def test_settings_follow_their_modules() -> None:
    modules = key_map(helpers.TEACHER_UNET, "tiny")
    found = remap_settings(
        {
            "unet.r": 4,
            "unet.alpha_pattern": {"up_blocks.1.resnets.2.conv1": 8, "mid_block.resnets.0.conv1": 2, "to_q": 1},
            "unet.target_modules": ["to_q", "up_blocks.3.attentions.2.proj_in", "up_blocks.0.resnets.0.conv1"],
        },
        modules,
    )
    assert found == {
        "unet.r": 4,
        "unet.alpha_pattern": {"up_blocks.0.resnets.1.conv1": 8, "to_q": 1},
        "unet.target_modules": ["to_q", "up_blocks.2.attentions.1.proj_in"],
    }
