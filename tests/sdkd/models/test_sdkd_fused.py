"""LoRAs fused into a model: weights as diffusers fuses them, digests of their own, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import helpers
import pytest
import torch
from lora_files import TEXT, delta, kohya, kohya_text, lcm_lora
from safetensors.torch import load_file, save_file
from training_runs import fused, sdkd, teacher

from sdkd.distill.training.lora import add_lora, save_lora
from sdkd.errors import InputError, ModelError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.fused import FusedSource, Lora, parse_loras, recorded_loras, with_loras
from sdkd.models.generation import FEW_STEPS, entry
from sdkd.models.resolve import load_component, load_eager, resolve
from sdkd.students.lora_file import FILE, write_lora

LAYERS = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "conv_in")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unet.safetensors`, and `both.safetensors`, which changes the text encoder, too."""
    folder = tmp_path_factory.mktemp("files")
    unet, text = helpers.tiny_unet(), helpers.tiny_text_encoder()
    save_file(kohya(unet, LAYERS), folder / "unet.safetensors")
    both = peft(kohya(unet, LAYERS[:1]), "unet", LAYERS[:1]) | peft(kohya_text(text), "text_encoder", TEXT)
    save_file(both, folder / "both.safetensors")
    return folder


def peft(state: dict[str, torch.Tensor], part: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """A kohya file in PEFT's names, without alphas."""
    start, halves = {"unet": "lora_unet", "text_encoder": "lora_te"}[part], {"lora_A": "down", "lora_B": "up"}
    return {
        f"{part}.{name}.{half}.weight": state[f"{start}_{name.replace('.', '_')}.lora_{old}.weight"]
        for name in names
        for half, old in halves.items()
    }


def test_file_and_scale_are_read_of_one_word(files: Path, tmp_path: Path) -> None:
    file = files / "unet.safetensors"
    assert Lora.parse(str(file)).scale == 1.0
    assert [Lora.parse(f"{file}:{text}").scale for text in ("0.5", "-2", "0", "1e-3")] == [0.5, -2, 0, 0.001]
    odd = tmp_path / "a:0.5" / "b:2"  # exists as a whole
    odd.mkdir(parents=True)
    shutil.copy(file, odd / FILE)
    found = Lora.parse(str(odd))
    assert (found.file, found.scale, found.name) == (str(odd / FILE), 1.0, "b:2")
    assert Lora.parse(f"{odd}:3").scale == 3
    assert found.sha256 == Lora.parse(str(file)).sha256
    for text, message in (
        (f"{file}:strong", r"scale 'strong' is not a number: give a number behind the colon, such as .*:0\.8"),
        (f"{file}:", r"scale '' is not a number"),
        (f"{file}:nan", r"scale of LoRA .* nan is not finite"),
        (f"{file}:inf", r"scale of LoRA .* inf is not finite"),
        (r"C:\loras\style.safetensors", r"LoRA 'C:.*style\.safetensors' does not exist: give a \.safetensors file"),
        (str(tmp_path / "none:0.5"), r"LoRA '.*none' does not exist"),
        (str(teacher() / "model_index.json"), r"is a \.json file: only \.safetensors is read"),
        (str(teacher() / "unet"), r"is no LoRA \(first weight: conv_in\.bias\)"),
    ):
        with pytest.raises(InputError, match=message):
            with_loras(resolve(teacher()), [text])
    with pytest.raises(InputError, match="is given twice: give it once, with one scale"):
        parse_loras([f"{file}:0.5", odd])


def test_the_weights_are_those_that_diffusers_fuses(files: Path) -> None:
    source = with_loras(resolve(teacher()), [f"{files / 'unet.safetensors'}:0.5", files / "both.safetensors"])
    pipe, state = load_eager(teacher()), load_file(files / "unet.safetensors")
    for name in LAYERS:
        pipe.unet.get_submodule(name).weight += 0.5 * delta(state, name)
    pipe.load_lora_weights(files / "both.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    plain = load_eager(teacher())
    for part in ("unet", "text_encoder"):
        found, expected = load_component(source, part).state_dict(), getattr(pipe, part).state_dict()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        changed = [
            name for name, value in getattr(plain, part).state_dict().items() if not torch.equal(value, found[name])
        ]
        assert len(changed) == {"unet": 3, "text_encoder": 4}[part]
    half = load_component(source, "unet", torch.float16)
    torch.testing.assert_close(half.conv_in.weight, pipe.unet.conv_in.weight.half(), rtol=1e-3, atol=1e-3)
    assert torch.equal(load_component(source, "vae").decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)


def test_a_lora_that_was_trained_here_is_fused_with_its_alpha_and_convolutions(tmp_path: Path) -> None:
    unet, generator = helpers.tiny_unet(), torch.Generator().manual_seed(8)
    for parameter in add_lora(unet, rank=3, alpha=5.0, targets="all"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_lora(unet, tmp_path)
    plain = load_component(resolve(teacher()), "unet").state_dict()
    found = load_component(with_loras(resolve(teacher()), [tmp_path]), "unet").state_dict()
    torch.testing.assert_close(found, fused(load_eager(teacher()), tmp_path).state_dict(), rtol=1e-5, atol=1e-5)
    layer = "up_blocks.0.upsamplers.0.conv"
    down, up = (dict(unet.named_parameters())[f"{layer}.lora_{half}.default.weight"] for half in "AB")
    added = 5 / 3 * (up.flatten(1) @ down.flatten(1)).detach().view_as(plain[f"{layer}.weight"])
    torch.testing.assert_close(found[f"{layer}.weight"] - plain[f"{layer}.weight"], added, rtol=1e-4, atol=1e-5)


def test_another_lora_or_scale_is_another_model_and_what_it_leaves_alone_is_not(files: Path) -> None:
    base = resolve(teacher())
    words = ("unet.safetensors", "unet.safetensors:0.5", "both.safetensors", "both.safetensors:0.5")
    found = [with_loras(base, [f"{files}/{word}"]).digests for word in words]
    assert len({one["unet"] for one in (*found, base.digests)}) == 5
    assert [one["text_encoder"] == base.digests["text_encoder"] for one in found] == [True, True, False, False]
    assert {one["vae_decoder"] for one in found} == {base.digests["vae_decoder"]}
    assert found[0] == with_loras(base, [Lora.of(files / "unet.safetensors")]).digests
    assert with_loras(base, []) is base
    once = with_loras(with_loras(base, [files / "unet.safetensors"]), [files / "both.safetensors"])
    assert isinstance(once, FusedSource)
    assert once.digests == with_loras(base, [files / "unet.safetensors", files / "both.safetensors"]).digests


def changed(state: dict[str, torch.Tensor], **others: torch.Tensor) -> dict[str, torch.Tensor]:
    return state | {name.replace("__", "."): value for name, value in others.items()}


def test_loras_of_others_are_refused(files: Path, tmp_path: Path) -> None:
    wide = helpers.tiny_unet(block_out_channels=(24, 32, 32, 32))
    state = load_file(files / "unet.safetensors")
    other = helpers.tiny_unet(cross_attention_dim=96)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    text = load_file(files / "both.safetensors")
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        (changed(state, lora_unet_conv_in__dora_scale=torch.ones(1)), "is a DoRA .*: only plain LoRA is taken"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "is a LoHa"),
        (kohya(other, [key]), "is for text embeddings 96 wide, this model's are 32 wide"),
        (
            kohya(wide, ["conv_in"]),
            "is for a model of other widths: 'lora_unet_conv_in.lora_down.weight' is for a layer",
        ),
        (
            {name.replace("conv_in", "conv_inn"): one for name, one in state.items()},
            "names 1 layers of 3 that this UNet",
        ),
        (
            {name.replace("layers.1", "layers.7"): one for name, one in text.items()},
            "a layer that this text encoder lacks",
        ),
        (
            {name.replace("text_encoder", "text_encoder_2"): one for name, one in text.items()},
            "has 4 layers for the text_encoder_2, and this pipeline has none",
        ),
        (changed(state, lora_unet_conv_in__alpha=torch.tensor(float("nan"))), "values that are no finite numbers"),
    ]
    for number, (weights, message) in enumerate(cases):
        save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / f"{number}.safetensors")
        with pytest.raises(ModelError, match=message):
            with_loras(resolve(teacher()), [tmp_path / f"{number}.safetensors"])
    kept = Lora.of(files / "unet.safetensors")
    with pytest.raises(ModelError, match="has changed since it was fused: restore the file, or fuse what there is now"):
        with_loras(resolve(teacher()), [Lora(str(files / "both.safetensors"), 1.0, kept.sha256)])
    with pytest.raises(ModelError, match=r"manifest is damaged .*loras.*scale"):
        recorded_loras({"loras": [{"file": "x", "sha256": "y"}]})


def test_a_teacher_s_lora_on_a_student_names_the_command_that_fits_it(tmp_path: Path) -> None:
    student = tmp_path / "student"
    about = {"teacher": str(teacher()), "student": "sd-tiny"}
    write_pipeline(helpers.tiny_pipeline(student="tiny"), student, about=about)
    file = lcm_lora(helpers.tiny_unet(), tmp_path / "lcm.safetensors", 8)
    write_lora(file, load_file(file), {}, entry(FEW_STEPS))
    with pytest.raises(ModelError, match=r"is for the teacher of sd-tiny .*: make it fit first, and give") as caught:
        with_loras(resolve(student), [file])
    command = str(caught.value).rpartition("new file: sdkd ")[2].split()
    sdkd(*command)
    made = with_loras(resolve(student), [command[2]])
    expected = fused(load_eager(student), Path(command[2])).state_dict()
    torch.testing.assert_close(load_component(made, "unet").state_dict(), expected, rtol=1e-5, atol=1e-6)
    assert not made.notes[1:]
    assert made.generation == FEW_STEPS
    unclear = kohya(load_component(student, "unet"), [LAYERS[0].replace("down_blocks.0", "up_blocks.1")])
    save_file(unclear, tmp_path / "unclear.safetensors")
    assert (
        "is taken for one of this student's own, since"
        in with_loras(resolve(student), [tmp_path / "unclear.safetensors"]).notes[-1]
    )


def test_how_a_model_is_run_comes_with_its_lora(files: Path, tmp_path: Path) -> None:
    one, two = (
        write_lora(tmp_path / f"{name}.safetensors", load_file(files / f"{name}.safetensors"), {}, entry(FEW_STEPS))
        for name in ("unet", "both")
    )
    found = with_loras(resolve(teacher()), [shutil.copy(one, tmp_path / "renamed.safetensors")])
    assert found.generation == FEW_STEPS
    assert with_loras(resolve(teacher()), [files / "unet.safetensors"]).generation is None
    with pytest.raises(ModelError, match="makes a model one of few steps, and this one is that already"):
        with_loras(found, [two])
    odd = write_lora(
        tmp_path / "odd.safetensors", load_file(one), {}, {"generation": {"steps": 0, "guidance_scale": 1}}
    )
    with pytest.raises(
        ModelError, match=r"LoRA '.*odd\.safetensors' says how it is to be run, and steps 0 is too small"
    ):
        with_loras(resolve(teacher()), [odd])
