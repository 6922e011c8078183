"""SDXL as a model: its folder opens as it was written; what is not whole, or not SDXL's base model, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from small_sdxl import sdxl_pipeline

from sdkd.errors import ModelError
from sdkd.families import SDXL
from sdkd.models.conditioning import encode, unet_arguments
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.exportable import check_configs
from sdkd.models.resolve import load_eager, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's folder; read it, do not change it."""
    path = tmp_path_factory.mktemp("sdxl") / "model"
    write_pipeline(sdxl_pipeline(), path, about={"random_weights": True})
    return path


def test_a_folder_opens_as_it_was_written(folder: Path) -> None:
    source, written = resolve(folder), sdxl_pipeline()
    assert source.family is SDXL
    assert source.parts == ("unet", "vae", "text_encoder", "text_encoder_2")
    assert tuple(source.digests) == ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
    pipe = load_eager(source)
    assert type(pipe) is StableDiffusionXLPipeline
    assert pipe.config.force_zeros_for_empty_prompt
    for part in source.parts:
        own, other = getattr(pipe, part).state_dict(), getattr(written, part).state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items()), part


def test_a_folder_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder_2")
    with pytest.raises(ModelError, match=r"lacks text_encoder_2: save or download it again"):
        resolve(tmp_path / "model")
    shutil.copytree(folder / "text_encoder_2", tmp_path / "model" / "text_encoder_2")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "X"]}))
    with pytest.raises(ModelError, match=r"the text_encoder_2 of .* is a transformers.X: sdkd loads CLIPTextModelWith"):
        resolve(tmp_path / "model")


def test_the_refiner_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(ModelError, match=r"is SDXL's refiner, which draws an image's last steps alone: give the base"):
        resolve(tmp_path / "model")


def test_text_encoders_must_be_as_wide_together_as_the_unet_s_text() -> None:
    configs = {"unet": dict(sdxl_pipeline().unet.config), "text_encoder": {"hidden_size": 32}}
    message = r"the pair of text encoders does not fit the UNet: its joint width is 80, the UNet's cross_attention_dim"
    with pytest.raises(ModelError, match=message):
        check_configs(configs | {"text_encoder_2": {"hidden_size": 48}})
    check_configs(configs | {"text_encoder_2": {"hidden_size": 32}})


def test_a_unet_call_has_text_and_sizes() -> None:
    pipe = sdxl_pipeline()
    with torch.no_grad():
        encoded = encode(pipe, ["a", "b"], 1, guided=True)
        given = unet_arguments(pipe, encoded, 2, (32, 48))
    assert given["encoder_hidden_states"].shape == (4, 77, 64)
    added = given["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 4))
    assert encoded.pooled is not None
    assert torch.equal(added["text_embeds"], torch.cat([torch.zeros_like(encoded.pooled), encoded.pooled]))
