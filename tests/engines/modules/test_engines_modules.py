"""Engine modules honour the contracts of diffusers and transformers, and refuse what an engine cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from engine_bundles import unet_feeds

from engines.modules.base import run_split
from engines.modules.components import EngineTextEncoder, EngineUNet
from engines.modules.vae import EngineVAE
from engines.pipelines.pipeline import build_module
from sdkd.bundle.manifest import Bundle
from sdkd.errors import EngineError, InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(engine_bundle: Path) -> Bundle:
    return Bundle.open(engine_bundle)


@pytest.fixture(scope="module")
def unet(bundle: Bundle) -> Iterator[EngineUNet]:
    module = build_module(bundle, "onnxruntime", "unet", torch.float32, CPU)
    yield module  # type: ignore[misc]
    module.close()


@pytest.fixture(scope="module")
def vae(bundle: Bundle) -> EngineVAE:
    return build_module(bundle, "onnxruntime", "vae", torch.float32, CPU)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def text_encoder(bundle: Bundle) -> EngineTextEncoder:
    return build_module(bundle, "onnxruntime", "text_encoder", torch.float32, CPU)  # type: ignore[return-value]


def arguments(batch: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    return tuple(unet_feeds(batch=batch, size=size).values())


# UNet


def test_unet_equals_eager_whatever_the_batch(unet: EngineUNet, eager: StableDiffusionPipeline) -> None:
    for batch in (1, 2, 3, 4, 5, 9):
        inputs = arguments(batch)
        torch.testing.assert_close(unet(*inputs).sample, eager.unet(*inputs).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(7), torch.tensor([7.5]), torch.tensor([7, 7])])
def test_unet_takes_every_form_of_timestep(unet: EngineUNet, eager: StableDiffusionPipeline, timestep: Any) -> None:
    sample, _, text = arguments()
    expected = eager.unet(sample, timestep, text, return_dict=False)[0]
    assert torch.allclose(unet(sample, timestep, text, return_dict=False)[0], expected, atol=1e-4)
    with pytest.raises(EngineError, match=r"one timestep for the whole batch, not \[1, 2\]"):
        unet(sample, torch.tensor([1, 2]), text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_unet_answers_in_the_dtype_of_the_latents(unet: EngineUNet, dtype: torch.dtype) -> None:
    sample, timestep, text = arguments()
    result = unet(sample.to(dtype), timestep, text.to(dtype)).sample
    assert result.dtype == dtype
    assert torch.allclose(result.float(), unet(*arguments()).sample, atol=0.1)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("class_labels", torch.zeros(2), "no such input"),
        ("timestep_cond", torch.zeros(2, 256), "not distilled with a guidance embedding"),
        ("attention_mask", torch.eye(77)[:2], "all tokens, so only a mask of ones"),
        ("encoder_attention_mask", torch.zeros(2, 77, dtype=torch.bool), "all tokens, so only a mask of ones"),
        ("added_cond_kwargs", {"image_embeds": [torch.zeros(1)]}, "IP-Adapter"),
        ("down_block_additional_residuals", (torch.zeros(1),), "--controlnet"),
        ("mid_block_additional_residual", torch.zeros(1), "--controlnet"),
        ("down_intrablock_additional_residuals", (torch.zeros(1),), "T2I-Adapter"),
    ],
)
def test_unet_refuses_what_the_graph_has_no_input_for(unet: EngineUNet, name: str, value: Any, reason: str) -> None:
    with pytest.raises(EngineError, match=rf"EngineUNet cannot take {name}[^:]*: .*{reason}.*engines\.unplug\(pipe\)"):
        unet(*arguments(), **{name: value})


def test_unet_accepts_what_changes_nothing(unet: EngineUNet) -> None:
    ones = {"encoder_attention_mask": torch.ones(2, 77, dtype=torch.bool), "attention_mask": torch.ones(2, 256)}
    empty = {"added_cond_kwargs": None, "timestep_cond": None}
    harmless = {"cross_attention_kwargs": {"scale": 0.5}, **ones, **empty}  # no adapter is there to be scaled
    assert torch.equal(unet(*arguments(), **harmless).sample, unet(*arguments()).sample)
    with pytest.raises(
        EngineError, match=r"EngineUNet cannot take cross_attention_kwargs\['gligen'\]: .*no such input"
    ):
        unet(*arguments(), cross_attention_kwargs={"scale": 1.0, "gligen": {"objs": 1}})
    with pytest.raises(InputError, match=r"cross_attention_kwargs\['scale'\] nan is not finite"):
        unet(*arguments(), cross_attention_kwargs={"scale": float("nan")})


def test_unet_shows_its_config(unet: EngineUNet, eager: StableDiffusionPipeline) -> None:
    assert unet.config.cross_attention_dim == unet.config["cross_attention_dim"] == 32
    assert unet.config.time_cond_proj_dim is None
    assert unet.in_channels == 4
    assert {key: value for key, value in unet.config.items() if not key.startswith("_")} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in eager.unet.config.items()
        if not key.startswith("_")
    }
    old = unet.full_config({"in_channels": 9})  # gets the defaults of today
    assert (old.in_channels, old.time_cond_proj_dim, old.sample_size) == (9, None, None)


# Device, dtype, offloading


def test_device_and_dtype_follow_to(bundle: Bundle) -> None:
    module = build_module(bundle, "onnxruntime", "unet", torch.float32, CPU)
    assert (module.device, module.dtype) == (CPU, torch.float32)
    assert module.to(torch.float16).dtype == torch.float16
    assert module.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert list(module.parameters()) == []
    assert module.state_dict() == {}


# Splitting


def test_batches_are_split_evenly(unet: EngineUNet) -> None:
    calls: list[int] = []

    class Counting:
        contract, parts = unet.session.contract, staticmethod(unet.session.parts)

        def run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            calls.append(feeds["sample"].shape[0])
            return unet.session.run(feeds)

    feeds = unet_feeds(batch=9)
    result = run_split(Counting(), feeds)["out_sample"]  # type: ignore[arg-type]
    assert calls == [3, 3, 3]  # not 4, 4, 1: a part below the smallest built batch would be refused
    assert torch.allclose(result, unet(*feeds.values()).sample, atol=1e-6)


# VAE


def test_vae_decodes_and_encodes_as_eager_does(vae: EngineVAE, eager: StableDiffusionPipeline) -> None:
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    image = vae.decode(latents).sample
    assert torch.allclose(image, eager.vae.decode(latents).sample, atol=1e-4)
    assert torch.equal(vae.decode(latents, return_dict=False, generator=torch.Generator())[0], image)
    found, expected = vae.encode(image).latent_dist, eager.vae.encode(image).latent_dist
    assert torch.allclose(found.mean, expected.mean, atol=1e-4)
    assert torch.allclose(found.std, expected.std, atol=1e-4)
    draws = [d.sample(torch.Generator().manual_seed(1)) for d in (vae.encode(image, return_dict=False)[0], expected)]
    assert torch.allclose(*draws, atol=1e-3)
    assert vae.config.scaling_factor == eager.vae.config.scaling_factor
    vae.enable_slicing()
    assert torch.allclose(vae.decode(latents).sample, image, atol=1e-5)
    vae.disable_slicing()


def test_vae_without_an_encoder_engine_says_what_to_build(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    del bundle.manifest.engines["onnxruntime/vae_encoder"]  # type: ignore[attr-defined]
    bundle.save()
    module = build_module(Bundle.open(bundle_copy), "onnxruntime", "vae", torch.float32, CPU)
    with pytest.raises(EngineError, match=r"no vae_encoder engine, which image-to-image and inpainting need"):
        module.encode(torch.zeros(1, 3, 32, 32))


# Text encoder


def test_text_encoder_answers_as_transformers_does(
    text_encoder: EngineTextEncoder, eager: StableDiffusionPipeline
) -> None:
    ids = eager.tokenizer(
        ["red", "a blue star", "x"], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    found, expected = text_encoder(ids, attention_mask=torch.ones(ids.shape)), eager.text_encoder(ids)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-4)
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-4)
    assert torch.equal(found[0], found.last_hidden_state)
    assert torch.equal(text_encoder(ids.int(), return_dict=False)[0], found[0])
    assert text_encoder.config.hidden_size == 32


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("attention_mask", torch.arange(77)[None] < 5, "causal mask built in, so only a mask of ones"),
        ("position_ids", torch.arange(77), "no such input"),
        ("output_hidden_states", True, "for clip_skip export with --hidden-states"),
        ("output_attentions", True, "last hidden state and the pooled output only"),
    ],
)
def test_text_encoder_refuses_with_a_reason(
    text_encoder: EngineTextEncoder, name: str, value: Any, reason: str
) -> None:
    with pytest.raises(EngineError, match=rf"EngineTextEncoder cannot take {name}: .*{reason}"):
        text_encoder(torch.zeros(1, 77, dtype=torch.int64), **{name: value})
