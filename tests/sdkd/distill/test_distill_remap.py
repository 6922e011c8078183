"""`sdkd remap-lora`: every style of names, and settings that differ from module to module."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdkd.cli import load_command
from sdkd.distill.remap_cli import run
from sdkd.distill.training.lora import FILE, add_lora, read_lora, save_lora
from sdkd.errors import InputError, ModelError, OutputExistsError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import resolve
from sdkd.students.blocks import build_student, key_map
from sdkd.students.lora_names import common_name, remap_settings


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = unet(sample, torch.tensor([10, 700]), encoder_hidden_states=text).sample
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remap") / "teacher"
    write_pipeline(helpers.tiny_pipeline(), path)
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of all targets whose alpha is not its rank, trained on the teacher."""
    unet = helpers.tiny_unet()
    generator = torch.Generator().manual_seed(8)
    for parameter in add_lora(unet, rank=2, alpha=3, targets="all"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return save_lora(unet, tmp_path_factory.mktemp("remap") / "lora")


@pytest.mark.parametrize("student", ["sd-tiny", "bk-base"])
def test_student_with_it_equals_the_student_of_the_fused_teacher(
    student: str, teacher: Path, lora: Path, tmp_path: Path
) -> None:
    run(lora, tmp_path, student, str(teacher))
    pipe = helpers.tiny_pipeline(student=student)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = helpers.tiny_pipeline()
    fused.load_lora_weights(lora)
    fused.fuse_lora()
    fused.unload_lora_weights()
    expected = build_student(fused.unet, student)
    own, other = pipe.unet.state_dict(), expected.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert (output(expected) - output(build_student(helpers.tiny_unet(), student))).abs().max() > 0.01


def test_the_command_says_what_was_kept(
    teacher: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(lora), str(tmp_path / "new.safetensors"), "--student", "tiny", "--teacher", str(teacher), "--json"]
    load_command("remap-lora").main(words, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    state, settings = read_lora(tmp_path / "new.safetensors")
    assert found["kept"] == len(state) == found["weights"] - found["removed"]
    assert 0 < found["removed"] < found["weights"]
    assert settings["unet.lora_alpha"] == 3
    with pytest.raises(OutputExistsError, match="already exists"):
        run(lora, tmp_path / "new.safetensors", "tiny", str(teacher))
    with pytest.raises(InputError, match="student 'huge' is unknown"):
        run(lora, tmp_path / "other", "huge", str(teacher))
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
    for same in ("lora_unet_mid_block_attentions_0_proj_in.alpha", "text_encoder.text_model.x", "lora_te_y"):
        assert common_name(same) == same
    with pytest.raises(ModelError, match="named as in the original code, which SDXL's LoRAs are"):
        common_name("lora_unet_input_blocks_4_1_proj_in.alpha")


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


def test_the_config_is_read_without_weights(teacher: Path) -> None:
    assert resolve(teacher).unet_config["block_out_channels"] == [16, 32, 32, 32]
    assert resolve("random:sd15-tiny").unet_config["block_out_channels"] == (320, 640, 1280)
    assert resolve("demo").unet_config["layers_per_block"] == 2
