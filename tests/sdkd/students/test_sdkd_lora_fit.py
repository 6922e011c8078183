"""Whose a LoRA is, by the names and shapes of all its layers; adapters that are none; alphas that differ by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from lora_files import delta, kohya
from safetensors.torch import load_file, save_file
from training_runs import fused, sdkd, teacher

from sdkd.distill.remap_cli import run
from sdkd.distill.training.lora import add_lora, lora_state
from sdkd.errors import ModelError
from sdkd.students.blocks import build_student, student_config, student_spec
from sdkd.students.lora_fit import Fit, check_text_width, fit_model, fit_student
from sdkd.students.lora_layers import Layer, other_kind, read_layers

TEACHER = helpers.TEACHER_UNET
ATTENTION = "attentions.0.transformer_blocks.0.attn1.to_q"


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


@pytest.mark.parametrize(
    ("student", "edge"), [("small", "conv_in"), ("tiny", "conv_out"), ("tiny", "time_embedding.linear_2")]
)
def test_a_student_s_own_lora_with_an_edge_stays_as_it_is(students: dict[str, Any], student: str, edge: str) -> None:
    unet = students[student]
    names = [name for name, _ in unet.named_modules() if name.endswith(("attn1.to_q", "resnets.1.conv1"))]
    for given in ([edge, *names], [edge]):  # an edge is the same in teacher and student
        found = fit(kohya(unet, given), student)
        assert modules(found.state) == set(given)
        assert (found.owner, found.sure) == ("model", True)


@pytest.mark.parametrize("student", ["small", "tiny"])
def test_a_teacher_s_lora_goes_through_the_layer_map(students: dict[str, Any], student: str) -> None:
    teacher = helpers.tiny_unet()
    names = ["conv_in", *(name for name, _ in teacher.named_modules() if name.endswith("attn1.to_q"))]
    found = fit(kohya(teacher, names), student)
    assert (found.owner, found.sure) == ("teacher", True)
    own = {name for name, _ in students[student].named_modules() if name.endswith("attn1.to_q")}
    assert modules(found.state) == own | {"conv_in"}


def test_what_fits_both_at_other_places_is_said_and_follows_the_rule(students: dict[str, Any]) -> None:
    place = f"up_blocks.1.{ATTENTION.replace('.0.', '.1.', 1)}"
    edged = fit(kohya(students["small"], ["conv_in", place]), "small", "model")  # an edge tells nothing
    assert (edged.owner, edged.sure) == ("model", False)
    state = kohya(students["small"], [place])
    found = fit(state, "small", "model")
    assert (found.owner, found.sure) == ("model", False)
    assert all(name.startswith("unet.up_blocks.1.attentions.1.") for name in found.state)
    assert "not all of sd-small's" in found.why
    with pytest.raises(ModelError, match="names no layer that sd-small keeps"):  # the teacher's second is removed
        fit(state, "small", "teacher")


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
    for width, name in ((1024, r"1024 \(sd21, sd21base\)"), (2048, r"2048 \(sdxl\)"), (96, "96")):
        sdxl = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, width)}
        with pytest.raises(ModelError, match=rf"text embeddings {name} wide, this model's are 768 \(sd15\) wide"):
            check_text_width(sdxl, {"cross_attention_dim": 768}, "the LoRA")


def test_a_kernel_of_one_is_a_linear_layer() -> None:
    name = "down_blocks.0.attentions.0.proj_in"  # a convolution here
    state = kohya(helpers.tiny_unet(), [name])
    thin = {key: value.flatten(1) if value.ndim else value for key, value in state.items()}
    found = fit_model(layers(thin), TEACHER, "the LoRA").state
    assert [tuple(value.shape) for value in found.values()] == [(4, 16, 1, 1), (16, 4, 1, 1)]


OTHERS = {
    "a DoRA": ("lora_unet_conv_in.dora_scale", "unet.conv_in.lora_magnitude_vector", "x.lora_magnitude_vector.weight"),
    "a LoHa": ("lora_unet_conv_in.hada_w1_a", "unet.conv_in.hada_t1"),
    "a LoKr": ("lora_unet_conv_in.lokr_w2",),
    "an OFT": ("lora_unet_conv_in.oft_blocks", "oft_unet_conv_in.oft_blocks", "unet.x.oft_R.weight", "unet.x.boft_R"),
    "an adapter of another kind": (
        *("lora_unet_conv_in.on_input", "base_model.model.conv_in.ia3_l", "x.b2.weight", "x.lora_mid.weight", "x.diff"),
        *("x.diff_b", "x.w_norm", "unet.conv_in.lora_B.bias", "x.scalar", "bundle_emb.x", "unet.x.vera_lambda_b"),
    ),
}


def test_other_adapters_are_named() -> None:
    plain = ["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.alpha"]
    assert other_kind(plain) is None
    for kind, names in OTHERS.items():
        for name in names:
            assert (other_kind([*plain, name]) or "").startswith(f"is {kind} (by {name!r}): only plain LoRA is taken")


def remapped(state: dict[str, torch.Tensor], folder: Path, student: str) -> tuple[dict[str, Any], Path]:
    old, new = folder / "old.safetensors", folder / "new.safetensors"
    save_file(state, old)
    return run(old, new, student, str(teacher())), new


def test_remap_keeps_the_alpha_of_every_layer(tmp_path: Path) -> None:
    unet = helpers.tiny_unet()
    names = ["conv_in", *(name for name, _ in unet.named_modules() if name.endswith(("to_out.0", "attn2.to_k")))]
    state = {name: value.half() if value.ndim else value for name, value in kohya(unet, names).items()}
    found, file = remapped(state, tmp_path, "small")
    assert (found["made_for"], found["kept"] + found["removed"]) == ("teacher", found["weights"])
    own = unet.state_dict()
    for name in names:
        own[f"{name}.weight"] += delta({key: value.float() for key, value in state.items()}, name)
    expected = build_student(unet, "small").state_dict()
    for name, value in fused(helpers.tiny_pipeline(student="small"), file).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert {value.dtype for value in load_file(file).values()} == {torch.float16, torch.float32}  # 3/4 in float32


def test_remap_says_whose_a_lora_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = helpers.tiny_pipeline(student="small").unet
    add_lora(unet, rank=2, alpha=3, targets="attn")
    save_file(lora_state(unet), tmp_path / "own.safetensors")
    words = [tmp_path / "own.safetensors", tmp_path / "new.safetensors", "--student", "small"]
    sdkd("remap-lora", *words, "--teacher", teacher())
    assert "Taken for a LoRA of sd-small: all its layers are sd-small's." in capsys.readouterr().out
    old, new = load_file(tmp_path / "own.safetensors"), load_file(tmp_path / "new.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_remap_refuses_before_anything_is_lost(tmp_path: Path) -> None:
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
            remapped(state | more, tmp_path, "tiny")
        assert not (tmp_path / "new.safetensors").exists()
    save_file({"unet.conv_in.hada_w1_a": torch.ones(1)}, tmp_path / "loha.safetensors")
    with pytest.raises(ModelError, match="is a LoHa"):
        run(tmp_path / "loha.safetensors", tmp_path / "x", "tiny", str(teacher()))


def test_settings_that_make_another_adapter_are_refused() -> None:
    state = {f"unet.conv_in.lora_{half}.weight": torch.ones(1, 1) for half in "AB"}
    with pytest.raises(ModelError, match=r"has the setting unet\.use_dora = True"):
        read_layers(state, "the LoRA", {"unet.use_dora": True})
    with pytest.raises(ModelError, match=r"states alpha twice, in 'unet\.conv_in\.alpha'"):
        read_layers(state | {"unet.conv_in.alpha": torch.ones(())}, "the LoRA", {"unet.r": 1, "unet.lora_alpha": 1})
