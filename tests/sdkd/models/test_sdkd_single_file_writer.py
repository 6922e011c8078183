"""A model written as one file: read back bit for bit by sdkd and by diffusers, and what it cannot hold is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import helpers
import ldm_files
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_families import MINI, differing, loaded, mini_models

from sdkd.core.marks import is_written_checkpoint, is_written_lora
from sdkd.errors import InputError, ModelError, OutputExistsError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.generation import FEW_STEPS, entry
from sdkd.models.resolve import load_component, load_eager, load_rest, resolve
from sdkd.models.single_file_writer import write_single_file
from sdkd.students.blocks import build_student, copy_unet

MODELS = ("mini", "mini-small", "mini-tiny", "mini-bk-small", "mini2base-tiny", "mini2", "minixl")


@pytest.fixture(autouse=True, scope="module")
def mini() -> Iterator[None]:
    with mini_models():
        yield


def written(model: Any, path: Path, **options: Any) -> Path:
    write_single_file(resolve(model), path, **{"precision": "fp32", **options})
    return path


@cache
def original(name: str) -> Any:
    """A pipeline; read it, do not change it."""
    return load_eager(f"random:{name}")


@pytest.fixture
def pipe() -> Any:
    """One that may get other parts, with a tokenizer that is quick to save."""
    parts = original("mini").components | {"tokenizer": helpers.tiny_tokenizer()}
    return type(original("mini"))(**parts, requires_safety_checker=False)


def saved(pipe: Any, folder: Path, **about: Any) -> str:
    write_pipeline(pipe, folder, about={"teacher": "t", "student": "s", **about})
    return str(folder)


@pytest.mark.parametrize("name", MODELS)
def test_sdkd_and_diffusers_read_every_weight_back(name: str, tmp_path: Path) -> None:
    """Diffusers with the configs of a folder, since it has no layout of its own for students."""
    source, pipe = resolve(f"random:{name}"), original(name)
    path = written(source, tmp_path / "one.safetensors")
    assert differing(loaded(path), pipe, source.parts) == []
    opened = resolve(path)
    assert opened.unet_config == source.unet_config
    assert [opened.config(part) for part in source.parts] == [source.config(part) for part in source.parts]
    assert opened.opened.prediction_type == MINI[name.split("-")[0]].prediction_type
    assert opened.random_weights

    tokenizers = {part: helpers.tiny_tokenizer() for part in source.family.tokenizers}
    type(pipe)(**(pipe.components | tokenizers)).save_pretrained(tmp_path / "folder")
    options = {"config": str(tmp_path / "folder"), "local_files_only": True, "torch_dtype": torch.float32}
    assert differing(type(pipe).from_single_file(str(path), **options), pipe, source.parts) == []


@pytest.mark.parametrize("name", ["mini-small", "mini-tiny", "minixl"])
def test_numbers_with_gaps_are_read_back(name: str, tmp_path: Path) -> None:
    path = written(f"random:{name}", tmp_path / "one.safetensors", spaced=True)
    assert differing(loaded(path), original(name), ("unet",)) == []


def test_names_shapes_and_metadata(tmp_path: Path) -> None:
    """As files of the original code have them, by names that are written down apart."""
    state = load_file(written("random:mini", tmp_path / "one.safetensors"))
    expected = {name: value for name, value in ldm_files.ldm_state(original("mini")).items() if "_ema." not in name}
    expected.pop("alphas_cumprod")
    assert state.keys() == expected.keys()
    assert not [name for name in state if not state[name].equal(expected[name])]
    xl = original("minixl")
    path = written("random:minixl", tmp_path / "xl.safetensors", precision="fp16")
    state, expected = load_file(path), ldm_files.sdxl_state(xl)
    unused = {name for name in expected if ".resblocks.2." in name or name.endswith("logit_scale")}
    assert state.keys() == expected.keys() - unused
    assert not [name for name in state if not state[name].equal(expected[name].half())]
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    about = json.loads(metadata.pop("sdkd"))
    assert about == {"random_weights": True}
    assert metadata == {
        "format": "pt",
        "written_by": "sdkd convert",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "minixl",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "random:minixl",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "64x64",
    }


def test_a_student_for_few_steps_says_how_it_is_run(pipe: Any, tmp_path: Path) -> None:
    pipe.unet = build_student(pipe.unet, "tiny")
    model = saved(pipe, tmp_path / "model", **entry(FEW_STEPS))
    path = tmp_path / "one.safetensors"
    plan = write_single_file(resolve(model), path)
    assert plan.notes == ("it is to be run with 4 steps, guidance 1, LCMScheduler: sdkd reads that in the file, in "
                          "other programs set it yourself",)  # fmt: skip
    opened = resolve(path)
    assert opened.generation == FEW_STEPS
    assert dict(opened.provenance) == {"teacher": "t", "student": "s", **entry(FEW_STEPS)}
    assert is_written_checkpoint(path)
    assert not is_written_lora(path)
    half = {name: value.half().float() for name, value in pipe.unet.state_dict().items()}
    assert all(value.equal(half[name]) for name, value in load_component(path, "unet").state_dict().items())


def test_a_guidance_embedding_and_v_prediction_come_along(pipe: Any, tmp_path: Path) -> None:
    pipe.unet = copy_unet(pipe.unet, time_cond_proj_dim=24)
    torch.nn.init.ones_(pipe.unet.time_embedding.cond_proj.weight)
    plan = write_single_file(resolve(saved(pipe, tmp_path / "lcm")), tmp_path / "lcm.safetensors")
    assert "takes the guidance scale as an embedding, which other programs pass over" in plan.notes[1]
    unet = load_component(tmp_path / "lcm.safetensors", "unet")
    assert unet.time_embedding.cond_proj.weight.equal(torch.ones(16, 24))

    plan = write_single_file(resolve("random:mini2"), tmp_path / "v.safetensors")
    assert plan.notes[0].startswith("it predicts v_prediction: sdkd reads that in the file, other programs judge")
    xl = original("minixl")
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = type(xl.scheduler).from_config(xl.scheduler.config, **changes)
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"), helpers.tiny_tokenizer())
    changed = type(xl)(**(xl.components | tokenizers | {"scheduler": scheduler}))
    plan = write_single_file(resolve(saved(changed, tmp_path / "xl")), tmp_path / "xl.safetensors")
    assert (plan.marks, plan.notes) == (("v_pred", "ztsnr"), ())
    config = load_rest(tmp_path / "xl.safetensors").scheduler.config
    assert {key: config[key] for key in changes} == changes


def test_a_schedulers_noise_is_named(pipe: Any, tmp_path: Path) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    plan = write_single_file(resolve(saved(pipe, tmp_path / "model")), tmp_path / "one.safetensors")
    assert plan.notes == (
        "its scheduler has beta_schedule linear, which the file does not say: set it where you run it",
    )


def test_what_has_no_place_is_refused(pipe: Any, tmp_path: Path) -> None:
    def refused(message: str, **parts: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        changed = type(pipe)(**(pipe.components | parts), requires_safety_checker=False)
        with pytest.raises(ModelError, match=message):
            write_single_file(resolve(saved(changed, folder)), tmp_path / "one.safetensors")
        assert not (tmp_path / "one.safetensors").exists()

    refused(
        r"the unet of .* has norm_num_groups 4 .read as 8.*no place: keep it", unet=helpers.tiny_unet(norm_num_groups=4)
    )
    refused("has attention_head_dim 4 .read as .1, 2, 2, 2", unet=helpers.tiny_unet(attention_head_dim=4))
    refused("text of width 40, predicts epsilon. is like that of no published",
            unet=helpers.tiny_unet(cross_attention_dim=40))  # fmt: skip
    refused("the text_encoder of .* has vocab_size 600 .read as 49408", text_encoder=helpers.tiny_text_encoder())
    vae = diffusers.AutoencoderKL(**helpers.VAE | {"scaling_factor": 0.3})
    refused("the vae of .* has scaling_factor 0.3 .read as 0.5.", vae=vae)
    tiny = diffusers.AutoencoderTiny()
    refused("the vae of .* is an AutoencoderTiny, and the original code has none such: keep it", vae=tiny)
    sample = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    refused("width 16, text of width 32, predicts sample. is like", scheduler=sample)


def test_weights_that_half_precision_cannot_hold(pipe: Any, tmp_path: Path) -> None:
    pipe.unet = copy_unet(pipe.unet)
    pipe.unet.conv_in.weight.data[0] = 1e6
    source = resolve(saved(pipe, tmp_path / "model"))
    message = r"weight model\.diffusion_model\.input_blocks\.0\.0\.weight of .* is not finite in fp16: choose fp32"
    with pytest.raises(ModelError, match=message):
        write_single_file(source, tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write_single_file(source, tmp_path / "one.safetensors", precision="fp32")


def test_outputs(tmp_path: Path) -> None:
    source = resolve("random:mini")
    for name, precision in (("one.ckpt", "fp16"), ("one.safetensors", "bf16")):
        with pytest.raises(InputError, match=r"give a name that ends in \.safetensors, and fp16 or fp32"):
            write_single_file(source, tmp_path / name, precision=precision)
    path = written(source, tmp_path / "one.safetensors")
    with pytest.raises(OutputExistsError, match="already exists: choose another name or pass --overwrite"):
        write_single_file(source, path)
    before = path.stat().st_size
    write_single_file(source, path, overwrite=True)
    assert path.stat().st_size < 0.6 * before
    with pytest.raises(InputError, match="is the input"):
        write_single_file(resolve(path), path, overwrite=True)
    other = ldm_files.write(tmp_path / "theirs.safetensors", {"x": torch.zeros(1)}, {"written_by": "sdkd"})
    with pytest.raises(OutputExistsError, match="sdkd did not write it"):
        write_single_file(source, other, overwrite=True)
