"""LoRAs of SDXL: the original code's names, both text encoders, and through the layer maps of its students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from lora_files import delta, kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_sdxl_unet import SDXL_UNET, small_sdxl_unet
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sdkd.distill.remap_cli import run
from sdkd.errors import ModelError
from sdkd.families import SDXL
from sdkd.families.sdxl import UNET
from sdkd.students.blocks import build_student, meta_unet
from sdkd.students.lora_adapter import fit_text, fit_unet
from sdkd.students.lora_file import METADATA
from sdkd.students.lora_fit import check_text_width, remap_lora
from sdkd.students.lora_layers import common_name, parts_of, read_layers

# Modules that have other names in the original code, where they are a layer's own.
RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
EDGES = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
SUFFIX = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def original(name: str) -> str:
    """A layer of a UNet with two layers per block, as the original code names it."""
    if name in EDGES:
        return EDGES[name]
    side, *rest = name.split(".")
    if side == "mid_block":
        place, layer = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(rest[:2])], rest[2:]
        return f"middle_block_{place}_{RESNET.get(layer[0], '_'.join(layer))}"
    block, kind, index, *layer = int(rest[0]), rest[1], int(rest[2]), *rest[3:]
    down = side == "down_blocks"
    if kind == "downsamplers":
        return f"input_blocks_{3 * block + 3}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{3 * block + 2}_2_conv"
    number = 3 * block + index + down
    inner = RESNET[layer[0]] if kind == "resnets" else "_".join(layer)
    return f"{'input' if down else 'output'}_blocks_{number}_{int(kind == 'attentions')}_{inner}"


def layers_of(unet: UNet2DConditionModel) -> list[str]:
    return [name for name, layer in unet.named_modules() if getattr(layer, "weight", torch.ones(1)).ndim in (2, 4)]


def in_original_names(state: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    flat = {f"lora_unet_{name.replace('.', '_')}": f"lora_unet_{original(name)}" for name in names}
    return {flat[key.partition(".")[0]] + "." + key.partition(".")[2]: value for key, value in state.items()}


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    return small_sdxl_unet()


def test_every_layer_has_a_name_in_the_original_code(teacher: UNet2DConditionModel) -> None:
    names = layers_of(teacher)
    assert len(names) == 793
    for name in names:
        assert common_name(f"lora_unet_{original(name)}.alpha") == f"lora_unet_{name.replace('.', '_')}.alpha"
    for unknown in ("input_blocks_1_0_in_layers_0", "middle_block_0_proj_in", "output_blocks_x_1_y", "conv_in"):
        assert common_name(f"lora_unet_{unknown}.alpha") == f"lora_unet_{unknown}.alpha"
    upsampler = "lora_unet_output_blocks_2_1_conv.alpha"  # of Stable Diffusion's level without attention
    assert common_name(upsampler) == "lora_unet_up_blocks_0_upsamplers_0_conv.alpha"


def test_names_are_those_that_diffusers_gives(teacher: UNet2DConditionModel) -> None:
    names = [name for name in layers_of(teacher) if ".transformer_blocks.1" in name or "resnets.0.conv" in name]
    state = in_original_names(kohya(teacher, names), names)
    found, _ = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=teacher.config)
    theirs, ours = (read_layers(weights, "the LoRA")["unet"] for weights in (found, state))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[module].up, layer.up) for module, layer in ours.items())


@pytest.mark.parametrize("name", [spec.name for spec in SDXL.students])
def test_student_with_it_equals_the_student_of_the_fused_teacher(name: str, teacher: UNet2DConditionModel) -> None:
    targets = ("to_q", "attn2.to_k", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_shortcut", "samplers.0.conv")
    names = ["conv_in", "add_embedding.linear_1", *(each for each in layers_of(teacher) if each.endswith(targets))]
    state = kohya(teacher, names, rank=2, alpha=lambda number: 1 + number % 3, size=0.1)
    fused = small_sdxl_unet()
    for each in names:
        fused.get_submodule(each).weight.data += delta(state, each)
    student, what = build_student(teacher, name), "the LoRA"
    layers = read_layers(in_original_names(state, names), what)["unet"]
    adapter, fit = fit_unet(layers, dict(student.config), {}, what)
    assert (fit.owner, fit.sure) == ("teacher", True)
    adapter.fuse_into(student, 1.0)
    expected, plain = build_student(fused, name).state_dict(), build_student(teacher, name).state_dict()
    for key, value in student.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)
    changed = {key for key in plain if not torch.equal(plain[key], expected[key])}
    assert changed == {key.replace(".lora_A", "").removeprefix("unet.") for key in fit.state if "lora_A" in key}
    assert len(remap_lora(in_original_names(state, names), teacher.config, name)) == 3 * len(changed)  # with alphas


def test_both_text_encoders_are_parts() -> None:
    layer = "text_model.encoder.layers.0.mlp.fc1"
    flat, halves = layer.replace(".", "_"), {"up": torch.ones(64, 1), "down": torch.ones(1, 32)}
    state = {f"lora_te1_{flat}.lora_{half}.weight": value for half, value in halves.items()}
    state |= {name.replace("te1", "te2"): value for name, value in state.items()}
    state |= {f"lora_unet_input_blocks_4_1_proj_in.lora_{half}.weight": torch.ones(1, 1) for half in halves}
    found = read_layers(state, "the LoRA")
    assert {part: list(layers) for part, layers in found.items()} == {
        "unet": ["down_blocks_1_attentions_0_proj_in"],
        "text_encoder": ["layers.0.mlp.fc1"],
        "text_encoder_2": ["layers.0.mlp.fc1"],
    }
    dotted = {f"text_encoder_2.{layer}.lora_linear_layer.{half}.weight": value for half, value in halves.items()}
    assert parts_of(dotted) == ("text_encoder_2",)
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                            vocab_size=99)  # fmt: skip
    encoder: Any = helpers.fixed_weights(CLIPTextModelWithProjection(config))
    weight = next(part.weight for name, part in encoder.named_modules() if name.endswith("mlp.fc1"))
    before = weight.clone()
    layers = read_layers(dotted, "it")["text_encoder_2"]
    fit_text("text_encoder_2", layers, encoder, {}, "it").fuse_into(encoder, 0.5)
    torch.testing.assert_close(weight, before + 0.5)
    with pytest.raises(ModelError, match="it has 1 layers for the text_encoder_2, and this pipeline has none"):
        fit_text("text_encoder_2", found["text_encoder_2"], None, {}, "it")
    wide = CLIPTextModelWithProjection(CLIPTextConfig(**{**config.to_dict(), "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"other widths: 'lora_te2_text_model_encoder_layers_0_mlp_fc1.*64 x 32"):
        fit_text("text_encoder_2", found["text_encoder_2"], wide, {}, "it")


def test_a_lora_of_another_family_is_refused(teacher: UNet2DConditionModel) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, config, message in (
        (768, UNET, r"768 \(sd15\) wide, this model's are 2048 \(sdxl\) wide"),
        (2048, {"cross_attention_dim": 768}, r"2048 \(sdxl\) wide, this model's are 768 \(sd15\) wide"),
    ):
        state = {f"lora_unet_{original(name)}.lora_down.weight": torch.zeros(1, width)}
        with pytest.raises(ModelError, match=message):
            check_text_width(state, config, "the LoRA")
    deep = kohya(helpers.tiny_unet(), ["down_blocks.3.resnets.0.conv1"])
    with pytest.raises(ModelError, match=r"names 1 layers of 1 that this UNet lacks .first: 'lora_unet_down_blocks_3"):
        fit_unet(read_layers(deep, "the LoRA")["unet"], SDXL_UNET, {}, "the LoRA")


def test_the_command_takes_sdxl_where_no_teacher_is_named(tmp_path: Path) -> None:
    blocks = [f"attentions.{layer}.transformer_blocks.{block}" for layer in (0, 1) for block in (4, 5)]
    names = [f"down_blocks.2.{block}.attn2.to_k" for block in blocks]
    names += ["up_blocks.0.attentions.2.proj_out", "mid_block.attentions.0.proj_in"]
    shapes = meta_unet(UNET)
    state = {}
    for name in names:
        outputs, inputs = shapes.get_submodule(name).weight.shape
        state[f"lora_unet_{original(name)}.lora_down.weight"] = torch.full((1, inputs), 0.5)
        state[f"lora_unet_{original(name)}.lora_up.weight"] = torch.full((outputs, 1), 0.25)
    for part, width in (("lora_te1", 768), ("lora_te2", 1280)):
        state |= {f"{part}_text_model_encoder_layers_3_mlp_fc2.lora_down.weight": torch.zeros(1, 4 * width),
                  f"{part}_text_model_encoder_layers_3_mlp_fc2.lora_up.weight": torch.zeros(width, 1)}  # fmt: skip
    save_file(state, tmp_path / "old.safetensors")
    found = run(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "koala-700m")
    kept = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "new.safetensors")}
    assert kept == {
        "unet.down_blocks.2.attentions.0.transformer_blocks.4.attn2.to_k",
        "unet.up_blocks.0.attentions.1.proj_out",
        "text_encoder.text_model.encoder.layers.3.mlp.fc2",
        "text_encoder_2.text_model.encoder.layers.3.mlp.fc2",
    }
    assert (found["made_for"], found["weights"], found["kept"], found["removed"]) == ("teacher", 16, 8, 8)
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        settings = json.loads(file.metadata()[METADATA])
    assert {key for key in settings if key.endswith(".r")} == {"unet.r", "text_encoder.r", "text_encoder_2.r"}
    with pytest.raises(ModelError, match=r"2048 \(sdxl\) wide, this model's are 768 \(sd15\) wide"):
        run(tmp_path / "old.safetensors", tmp_path / "other.safetensors", "tiny")
