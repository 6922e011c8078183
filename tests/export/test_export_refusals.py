"""What cannot run as engines is refused before weights are read: by `export`, by `build-engine` and by `plug`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from graph_bundles import graph_bundle
from helpers import fixed_weights
from peft import LoraConfig
from small_bundles import TINY_VAE, UNET, small_controlnet, small_pipeline
from torch.nn.utils.parametrizations import weight_norm
from typer.testing import CliRunner

from engines.pipelines.pipeline import plug
from export import build_engine, export_pipeline
from export.source import open_source
from sdkd.cli import app
from sdkd.errors import ExportError, ModelError
from sdkd.models.exportable import check_config, check_module


def pipeline(**parts: Any) -> Any:
    """The small pipeline with other parts; with a ControlNet where one is given."""
    every = small_pipeline().components | {"requires_safety_checker": False} | parts
    every.pop("image_encoder", None)
    kind = StableDiffusionControlNetPipeline if "controlnet" in parts else type(small_pipeline())
    return kind(**every)


UNETS: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"num_class_embeds": 10}, "num_class_embeds is 10: it takes class labels"),
    "unclip": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        "class_embed_type is 'projection'",
    ),
    "added": ({"addition_embed_type": "text"}, "addition_embed_type is 'text': it takes conditions that no"),
    "projected": ({"encoder_hid_dim": 16}, "encoder_hid_dim_type is 'text_proj': it projects other embeddings"),
    "gligen": ({"attention_type": "gated"}, "attention_type is 'gated': it takes boxes and phrases"),
    "width": ({"cross_attention_dim": 24}, "text encoder does not fit the UNet: its width is 32, the UNet's cross_att"),
    "latents": ({"out_channels": 8}, "VAE does not fit the UNet: its latent_channels is 4, the UNet's out_channels 8"),
}


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_that_takes_more_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    changes, message = UNETS[name]
    pipe = pipeline(unet=UNet2DConditionModel(**(UNET | changes)))
    with pytest.raises(ModelError, match=message):
        export_pipeline(pipe, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_command_line_refuses_by_the_config_alone(tmp_path: Path) -> None:
    small_pipeline().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_class_embeds": 10}))
    found = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "bundle")])
    assert found.exit_code == 1
    assert "num_class_embeds is 10: it takes class labels" in " ".join(found.output.split())


def test_an_ip_adapter_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"IP-Adapter, which reads images: give the model without it, and --ip-adapter"
    ):
        check_config("unet", UNET | {"encoder_hid_dim_type": "ip_image_proj"})


CONTROLNETS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"cross_attention_dim": 24}, "cross_attention_dim is 24, the UNet's is 32: give a ControlNet that"),
    "width": ({"block_out_channels": (16, 16)}, r"block_out_channels is \[16, 16\], the UNet's is \[16, 32\]"),
    "layers": ({"layers_per_block": 2}, "layers_per_block is 2, the UNet's is 1"),
    "image": ({"conditioning_embedding_out_channels": (8, 8, 16)}, "reads 4 pixels per latent, the VAE has 2"),
    "channels": ({"in_channels": 9}, "takes 9 channels, the latents have 4"),
    "classes": ({"num_class_embeds": 4}, "the controlnet cannot run as an engine, its num_class_embeds is 4"),
    "pooled": ({"global_pool_conditions": True}, "pools its residuals over the image"),
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_of_another_layout_is_refused(tmp_path: Path, name: str) -> None:
    changes, message = CONTROLNETS[name]
    controlnet = small_controlnet(**changes)
    with pytest.raises(ModelError, match=message):
        export_pipeline(pipeline(controlnet=controlnet), tmp_path / "bundle")
    controlnet.save_pretrained(tmp_path / "controlnet")
    source = open_source(small_pipeline(), {"controlnet": str(tmp_path / "controlnet")})
    with pytest.raises(ModelError, match=message):
        source.check(source.components)


def test_a_pix2pix_unet_has_no_controlnet() -> None:
    pipe = pipeline(unet=UNet2DConditionModel(**(UNET | {"in_channels": 8})), controlnet=small_controlnet())
    with pytest.raises(ModelError, match=r"takes 8 channels.*leave the ControlNet out"):
        open_source(pipe, {}).check(("unet",))


def test_several_controlnets_are_refused_unless_they_stay_eager(tmp_path: Path) -> None:
    pipe = pipeline(controlnet=MultiControlNetModel([small_controlnet(), small_controlnet()]))
    message = r"has 2 ControlNets, and a bundle holds one: set pipe\.controlnet to one of pipe\.controlnet\.nets"
    with pytest.raises(ModelError, match=message):
        export_pipeline(pipe, tmp_path / "bundle")
    open_source(pipe, {}).check(("unet", "text_encoder"))


def test_a_vae_of_other_latents_is_refused(tmp_path: Path) -> None:
    AutoencoderTiny(**TINY_VAE, latent_channels=16).save_pretrained(tmp_path / "vae")
    source = open_source(small_pipeline(), {"vae": str(tmp_path / "vae")})
    with pytest.raises(ModelError, match="its number of latent channels is 16, the model needs 4"):
        source.check(source.components)


def test_parts_of_other_classes_are_refused() -> None:
    pipe = small_pipeline()
    pipe.vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1)
    with pytest.raises(ModelError, match=r"vae of this .* is an AutoencoderKLTemporalDecoder, which is not exported"):
        open_source(pipe, {})


def seamless(pipe: Any) -> None:
    """As scripts make tiles that fit together."""
    pipe.unet.conv_in._conv_forward = lambda x, weight, bias: pipe.unet.conv_in(x)


def token_merging(pipe: Any) -> None:
    """As tomesd patches a model."""
    pipe.unet.register_forward_pre_hook(seamless)


def blocks_cached(pipe: Any) -> None:
    """As DeepCache patches blocks."""
    pipe.unet.up_blocks[0].forward = pipe.unet.up_blocks[1].forward


def with_lora(pipe: Any, fused: bool = False) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    if fused:
        pipe.unet.fuse_lora()


PATCHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "FreeU": (
        lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4),
        r"unet\.up_blocks\.0 .* FreeU on, .*pipe\.disable_freeu\(\)",
    ),
    "DeepCache": (blocks_cached, r"unet\.up_blocks\.0 .* a forward of its own, .*DeepCache"),
    "ToMe": (token_merging, r"unet of this pipeline has a forward hook \(seamless\), .*: remove it first"),
    "seamless tiling": (seamless, r"unet\.conv_in .* a _conv_forward of its own, .*remove the patch"),
    "layerwise casting": (
        lambda p: p.unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
        r"hooks of diffusers \(layerwise_casting\), .*leave out casting",
    ),
    "offloading": (lambda p: cpu_offload_with_hook(p.unet, "cpu"), r"hooks of accelerate.*remove_all_hooks\(\)"),
    "offloaded": (lambda p: p.unet.to("meta"), r"offloaded.*pipe\.remove_all_hooks\(\)"),
    "weight norm": (lambda p: weight_norm(p.unet.conv_in), "parametrized weights, .*remove_parametrizations first"),
    "fused QKV": (
        lambda p: p.unet.fuse_qkv_projections(),
        r"fused QKV projections.*: call pipe\.unfuse_qkv_projections\(\) first",
    ),
    "8 bits": (
        lambda p: p.unet.to(torch.float8_e4m3fn),
        r"quantized or stored in 8 bits .*float8_e4m3fn.*without quantization_config",
    ),
    "LoRA": (with_lora, r"not fused: call pipe\.fuse_lora\(\) and pipe\.unload_lora"),
    "fused LoRA": (lambda p: with_lora(p, True), r"fused and still there: call pipe\.unload_lora_weights\(\) first"),
    "FaceID-Plus": (
        lambda p: setattr(p.unet, "encoder_hid_proj", MultiIPAdapterImageProjection([torch.nn.Identity()])),
        "an IP-Adapter with Identity, which sdkd does not export",
    ),
    "projected": (
        lambda p: setattr(p.unet, "encoder_hid_proj", torch.nn.Linear(8, 8)),
        r"a projection of other embeddings \(encoder_hid_proj\), .*: run it eagerly",
    ),
    "AnimateDiff": (lambda p: setattr(p, "motion_adapter", p.vae), "has a motion adapter of AnimateDiff"),
    "flow matching": (
        lambda p: setattr(p, "scheduler", FlowMatchEulerDiscreteScheduler()),
        "scheduler FlowMatchEulerDiscreteScheduler has no noise schedule by beta_st",
    ),
}


@pytest.mark.parametrize("what", PATCHES)
def test_what_a_graph_would_not_hold_is_refused_by_name(what: str) -> None:
    pipe = pipeline(unet=fixed_weights(UNet2DConditionModel(**UNET)))
    open_source(pipe, {}).check(("unet",))
    change, message = PATCHES[what]
    change(pipe)
    with pytest.raises((ModelError, ExportError), match=message):
        open_source(pipe, {}).check(("unet",))


def test_a_method_of_a_library_s_class_that_comes_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(UNet2DConditionModel):
        def get_time_embed(self, *_: Any) -> None:
            raise NotImplementedError

    with pytest.raises(ModelError, match=r"code of its own \(.*Own\), .*take it off first"):
        check_module("unet", Own(**UNET))
    monkeypatch.setattr(BasicTransformerBlock, "_chunked", lambda self: self, raising=False)
    with pytest.raises(ModelError, match=r"code of its own \(BasicTransformerBlock\._chunked of test_export_"):
        check_module("unet", UNet2DConditionModel(**UNET))


def test_a_folder_saved_with_a_lora_says_so(tmp_path: Path) -> None:
    pipe = pipeline(unet=UNet2DConditionModel(**UNET))
    with_lora(pipe)
    pipe.save_pretrained(tmp_path / "model")
    message = r"was saved with a LoRA that is not fused.*pipe\.fuse_lora\(\)"
    for command in ("export", "generate", "build-engine"):
        words = {"export": [str(tmp_path / "b")], "generate": ["a star"], "build-engine": ["--target", "onnxruntime"]}
        found = CliRunner().invoke(app, [command, str(tmp_path / "model"), *words[command]])
        assert re.search(message, " ".join(found.output.split())), found.output


def test_build_and_plug_refuse_what_an_older_export_let_through(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "fp32", ("unet", "vae_decoder", "text_encoder"))
    classes = pipeline(unet=UNet2DConditionModel(**(UNET | {"num_class_embeds": 10})))
    with pytest.raises(ModelError, match="num_class_embeds is 10: it takes class labels"):
        plug(classes, bundle, "onnxruntime", ["unet"])
    config = bundle.path / "unet" / "config.json"
    config.write_text(json.dumps(bundle.config("unet") | {"num_class_embeds": 10}))
    with pytest.raises(ModelError, match="num_class_embeds is 10: it takes class labels"):
        build_engine(bundle, "onnxruntime")
