"""Whose a LoRA is, by the names and shapes of all its layers; adapters that are none; alphas that differ by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdkd.cli import load_command
from sdkd.distill.remap_cli import run
from sdkd.distill.training.lora import add_lora, lora_state, read_lora
from sdkd.errors import InputError, ModelError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.students.blocks import build_student, student_config, student_spec
from sdkd.students.lora_fit import Fit, check_text_width, fit_model, fit_student
from sdkd.students.lora_layers import Layer, read_layers
from sdkd.students.lora_names import other_kind

TEACHER = helpers.TEACHER_UNET
ATTENTION = "attentions.0.transformer_blocks.0.attn1.to_q"


def kohya(unet: Any, names: list[str], rank: int = 4, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """A kohya file for layers of a UNet; the alpha grows from layer to layer."""
    generator, state = torch.Generator().manual_seed(3), {}
    for number, name in enumerate(names):
        weight = unet.get_submodule(name).weight
        key = f"lora_unet_{name.replace('.', '_')}"
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *(1, 1)[: weight.ndim - 2], generator=generator)
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(alpha + number)
    return state


def delta(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What such a file adds to a layer's weight."""
    key = f"lora_unet_{name.replace('.', '_')}"
    down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
    return float(state[f"{key}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])


def layers(state: dict[str, torch.Tensor]) -> dict[str, Layer]:
    return read_layers(state, "the LoRA")["unet"]


def fit(state: dict[str, torch.Tensor], student: str, unclear: Any = "model") -> Fit:
    spec = student_spec(student)
    return fit_student(layers(state), student_config(TEACHER, spec), TEACHER, spec, "the LoRA", unclear=unclear)


def modules(state: Any) -> set[str]:
    return {name.removeprefix("unet.").rpartition(".lora_")[0] for name in state}


@pytest.fixture(scope="module")
def students() -> dict[str, Any]:
    return {name: build_student(helpers.tiny_unet(), name) for name in ("small", "tiny")}


@pytest.mark.parametrize("student", ["small", "tiny"])
@pytest.mark.parametrize("edge", ["conv_in", "conv_out", "time_embedding.linear_2"])
def test_a_student_s_own_lora_with_an_edge_stays_as_it_is(students: dict[str, Any], student: str, edge: str) -> None:
    unet = students[student]
    names = [name for name, _ in unet.named_modules() if name.endswith(("attn1.to_q", "resnets.1.conv1"))]
    found = fit(kohya(unet, [edge, *names]), student)
    assert (found.owner, found.sure) == ("model", True)
    assert modules(found.state) == {edge, *names}
    alone = fit(kohya(unet, [edge]), student)  # the same in teacher and student
    assert modules(alone.state) == {edge}
    assert alone.sure


@pytest.mark.parametrize("student", ["small", "tiny"])
def test_a_teacher_s_lora_goes_through_the_layer_map(students: dict[str, Any], student: str) -> None:
    teacher = helpers.tiny_unet()
    names = ["conv_in", *(name for name, _ in teacher.named_modules() if name.endswith("attn1.to_q"))]
    found = fit(kohya(teacher, names), student)
    assert (found.owner, found.sure) == ("teacher", True)
    own = {name for name, _ in students[student].named_modules() if name.endswith("attn1.to_q")}
    assert modules(found.state) == own | {"conv_in"}


def test_what_fits_both_at_other_places_is_said_and_follows_the_rule(students: dict[str, Any]) -> None:
    state = kohya(students["small"], [f"up_blocks.1.{ATTENTION.replace('.0.', '.1.', 1)}"])
    for unclear, place in (("model", "up_blocks.1.attentions.1"), ("teacher", None)):
        if place is None:  # the teacher's second layer of an up block is removed
            with pytest.raises(ModelError, match="names no layer that sd-small keeps"):
                fit(state, "small", unclear)
            continue
        found = fit(state, "small", unclear)
        assert (found.owner, found.sure) == ("model", False)
        assert all(name.startswith(f"unet.{place}.") for name in found.state)
        assert "not all of sd-small's" in found.why


def test_a_lora_of_another_model_is_refused(students: dict[str, Any]) -> None:
    deep = kohya(helpers.tiny_unet(), ["mid_block.attentions.0.proj_in"])
    with pytest.raises(ModelError, match=r"names 1 layers of 1 that this UNet lacks \(first: 'lora_unet_mid_block"):
        fit_model(layers(deep), student_config(TEACHER, "tiny"), "the LoRA")
    strange = {name.replace("attn1", "attn7"): value for name, value in
               kohya(students["small"], [f"down_blocks.0.{ATTENTION}"]).items()}  # fmt: skip
    with pytest.raises(ModelError, match=r"names 1 layers of 1 that sd-small and its teacher lack .*attn7"):
        fit(strange, "small")
    wide = helpers.tiny_unet(block_out_channels=(24, 32, 32, 32))
    with pytest.raises(ModelError, match=r"other widths: 'lora_unet_conv_in.*24 x 4 x 3 x 3, conv_in .*16 x 4 x 3 x 3"):
        fit(kohya(wide, ["conv_in"]), "small")
    for width, name in ((1024, r"1024 \(SD 2\.x\)"), (2048, r"2048 \(SDXL\)"), (96, "96")):
        sdxl = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, width)}
        with pytest.raises(ModelError, match=rf"text embeddings {name} wide, this model's are 768 \(SD 1\.x\) wide"):
            check_text_width(sdxl, {"cross_attention_dim": 768}, "the LoRA")


def test_a_kernel_of_one_is_a_linear_layer() -> None:
    name = "down_blocks.0.attentions.0.proj_in"  # a convolution here
    state = kohya(helpers.tiny_unet(), [name])
    thin = {key: value.flatten(1) if value.ndim else value for key, value in state.items()}
    found = fit_model(layers(thin), TEACHER, "the LoRA").state
    assert [tuple(value.shape) for value in found.values()] == [(4, 16, 1, 1), (16, 4, 1, 1)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "a DoRA"),
        ("unet.conv_in.lora_magnitude_vector", "a DoRA"),
        ("base_model.model.conv_in.lora_magnitude_vector.weight", "a DoRA"),
        ("lora_unet_conv_in.hada_w1_a", "a LoHa"),
        ("unet.conv_in.hada_t1", "a LoHa"),
        ("lora_unet_conv_in.lokr_w2", "a LoKr"),
        ("lora_unet_conv_in.oft_blocks", "an OFT"),
        ("oft_unet_conv_in.oft_blocks", "an OFT"),
        ("unet.conv_in.oft_R.weight", "an OFT"),
        ("unet.conv_in.boft_R", "a BOFT"),
        ("lora_unet_conv_in.on_input", "an IA3"),
        ("base_model.model.conv_in.ia3_l", "an IA3"),
        ("lora_unet_conv_in.b2.weight", "a GLoRA"),
        ("lora_unet_conv_in.lora_mid.weight", "a LoCon with Tucker decomposition"),
        ("lora_unet_conv_in.diff", "a full difference of weights"),
        ("lora_unet_conv_in.diff_b", "a full difference of weights"),
        ("lora_unet_conv_norm_out.w_norm", "a difference of norm layers"),
        ("unet.conv_in.lora_B.bias", "a LoRA with biases"),
        ("lora_unet_conv_in.scalar", "a LoRA with a trained scalar"),
        ("bundle_emb.face.string_to_param.*", "a textual inversion in a LoRA file"),
        ("unet.conv_in.vera_lambda_b", "a VeRA"),
    ],
)
def test_other_adapters_are_named(name: str, kind: str) -> None:
    plain = ["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.alpha"]
    assert other_kind(plain) is None
    assert (other_kind([*plain, name]) or "").startswith(f"is {kind} (by {name!r}): only plain LoRA is taken")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "teacher"
    write_pipeline(helpers.tiny_pipeline(), path)
    return path


def remapped(state: dict[str, torch.Tensor], teacher: Path, folder: Path, student: str) -> tuple[dict[str, Any], Path]:
    save_file(state, folder / "old.safetensors")
    return run(
        folder / "old.safetensors", folder / "new.safetensors", student, str(teacher)
    ), folder / "new.safetensors"


def test_remap_keeps_the_alpha_of_every_layer(teacher: Path, tmp_path: Path) -> None:
    unet = helpers.tiny_unet()
    names = ["conv_in", *(name for name, _ in unet.named_modules() if name.endswith(("to_out.0", "attn2.to_k")))]
    state = {name: value.half() if value.ndim else value for name, value in kohya(unet, names).items()}
    found, file = remapped(state, teacher, tmp_path, "small")
    assert (found["made_for"], found["kept"] + found["removed"]) == ("teacher", found["weights"])
    own = unet.state_dict()
    for name in names:
        own[f"{name}.weight"] += delta({key: value.float() for key, value in state.items()}, name)
    expected = build_student(unet, "small").state_dict()
    pipe = helpers.tiny_pipeline(student="small")
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert {value.dtype for value in load_file(file).values()} == {torch.float16, torch.float32}  # 3/4 in float32


def test_remap_says_whose_a_lora_was(
    students: dict[str, Any], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = helpers.tiny_pipeline(student="small").unet
    add_lora(unet, rank=2, alpha=3, targets="attn")
    save_file(lora_state(unet), tmp_path / "own.safetensors")
    words = [str(tmp_path / "own.safetensors"), str(tmp_path / "new.safetensors"), "--student", "small"]
    load_command("remap-lora").main([*words, "--teacher", str(teacher)], standalone_mode=False)
    assert "Taken for a LoRA of sd-small: all its layers are sd-small's." in capsys.readouterr().out
    old, new = load_file(tmp_path / "own.safetensors"), load_file(tmp_path / "new.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_remap_refuses_before_anything_is_lost(teacher: Path, tmp_path: Path) -> None:
    state = kohya(helpers.tiny_unet(), ["conv_in"])
    flat = "lora_unet_conv_in"
    for more, message in (
        ({f"{flat}.dora_scale": torch.ones(1)}, "is a DoRA"),
        ({f"{flat}.beta": torch.ones(1)}, r"has 1 of 4 weights whose names belong to no layer .*conv_in\.beta"),
        ({"lora_unet_conv_out.lora_up.weight": torch.ones(4, 4)}, "conv_out.* without the down matrix"),
        ({f"{flat}.lora_up.weight": torch.ones(16, 3, 1, 1)}, "their ranks do not agree"),
        ({f"{flat}.alpha": torch.tensor(float("inf"))}, "no finite numbers"),
    ):
        with pytest.raises(ModelError, match=message):
            remapped(state | more, teacher, tmp_path, "tiny")
        assert not (tmp_path / "new.safetensors").exists()
    for settings, wrong in (
        ("[1", "is not JSON"),
        ("[1]", "is damaged"),
        ("[" * 100_000, "nested too deeply"),
        ('{"unet.r": "x"}', "unet.r is 'x', not a whole number"),
        ('{"unet.lora_alpha": 1e999}', "unet.lora_alpha is inf, not a finite number"),
        ('{"unet.rank_pattern": {"a": "b"}}', "unet.rank_pattern.a is 'b', not a whole number"),
        ('{"text_encoder.target_modules": 5}', "text_encoder.target_modules is 5, not a list or text"),
    ):
        save_file(state, tmp_path / "odd.safetensors", {"lora_adapter_metadata": settings})
        with pytest.raises(InputError, match=rf"odd\.safetensors' has unusable settings: .*{wrong}.*; make it again"):
            read_lora(tmp_path / "odd.safetensors")
    save_file({"unet.conv_in.hada_w1_a": torch.ones(1)}, tmp_path / "loha.safetensors")
    with pytest.raises(ModelError, match="is a LoHa"):
        run(tmp_path / "loha.safetensors", tmp_path / "x", "tiny", str(teacher))


def test_settings_that_make_another_adapter_are_refused() -> None:
    state = {f"unet.conv_in.lora_{half}.weight": torch.ones(1, 1) for half in "AB"}
    with pytest.raises(ModelError, match=r"has the setting unet\.use_dora = True"):
        read_layers(state, "the LoRA", {"unet.use_dora": True})
    with pytest.raises(ModelError, match=r"states alpha twice, in 'unet\.conv_in\.alpha'"):
        read_layers(state | {"unet.conv_in.alpha": torch.ones(())}, "the LoRA", {"unet.r": 1, "unet.lora_alpha": 1})


def test_a_rank_without_room_is_refused_before_memory_is_taken() -> None:
    unet = helpers.tiny_unet()
    with pytest.raises(InputError, match=r"lora_rank 100000 is above what any layer has room for: a rank of 32"):
        add_lora(unet, rank=100_000, alpha=1)
    assert not hasattr(unet, "peft_config")
    assert len(add_lora(unet, rank=32, alpha=1))
