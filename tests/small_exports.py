"""A two-level pipeline that exports in seconds, and its bundle, made once per test run."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir
import small_bundles
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from helpers import CROSS, fixed_weights, tiny_text_encoder, tiny_tokenizer
from made_once import made_once

from export import export_pipeline
from export.check.parity import Reference, case_inputs, parity_cases, run_eager
from export.graph.components import component_module, graph_module
from export.graph.precision import cast
from export.graph.to_onnx import GRAPH, OnnxGraph
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import TRANSFORMS_FILE
from sdkd.core.contract import Contract
from sdkd.core.files import read_json
from sdkd.models.exportable import module_config

# The smallest UNet that there is: one level.
ONE_LEVEL: dict[str, Any] = small_bundles.UNET | {
    "down_block_types": (CROSS,),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (16,),
    "attention_head_dim": (1,),
}


def small_pipeline(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """What `small_bundles.small_pipeline` is, of modules that nobody else has; `unet` changes its UNet's config."""
    pipe = StableDiffusionPipeline(
        vae=fixed_weights(AutoencoderKL(**small_bundles.VAE), seed + 1),
        text_encoder=tiny_text_encoder(seed + 2),
        tokenizer=tiny_tokenizer(),
        unet=fixed_weights(UNet2DConditionModel(**(small_bundles.UNET | unet)), seed),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def small_bundle() -> Bundle:
    """The exported pipeline in float32, checked; read it, do not change it."""
    return Bundle.open(made_once("exported", lambda path: export_pipeline(small_pipeline(), path)))


def bundle_copy(folder: Path) -> Bundle:
    """A bundle of one's own."""
    shutil.copytree(small_bundle().path, folder)
    return Bundle.open(folder)


@cache
def small_graph(component: str) -> tuple[torch.nn.Module, OnnxGraph, Contract, Path]:
    """One component of the bundle: its module, graph, contract, and the graph's file."""
    return _graph(small_bundle(), component, component_module(small_pipeline(), component))


def _graph(
    bundle: Bundle, component: str, module: torch.nn.Module
) -> tuple[torch.nn.Module, OnnxGraph, Contract, Path]:
    record, file = bundle.component(component), bundle.path / component / GRAPH
    transforms, unmatched = read_json(file.parent / TRANSFORMS_FILE), tuple(record.details["unmatched_weights"])
    graph = OnnxGraph(onnx_ir.load(file), record.opset, transforms, unmatched, record.details["float32_nodes"])
    return module, graph, record.contract, file


def half_bundle() -> Bundle:
    """UNet and VAE's decoder in fp16, not checked; read it, do not change it."""
    options: dict[str, Any] = {"precision": "fp16", "components": ("unet", "vae_decoder"), "verify": False}
    return Bundle.open(made_once("exported-half", lambda path: export_pipeline(small_pipeline(), path, **options)))


@cache
def half_unet() -> tuple[torch.nn.Module, OnnxGraph, Contract, Path]:
    """The UNet in fp16, as `small_graph` gives it."""
    return _graph(half_bundle(), "unet", cast(small_pipeline().unet, "fp16"))


def with_controlnet(pipe: StableDiffusionPipeline) -> StableDiffusionControlNetPipeline:
    """The pipeline with a small ControlNet."""
    parts = pipe.components | {"controlnet": small_bundles.small_controlnet()}
    found = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def wide_unet(channels: int) -> UNet2DConditionModel:
    """A UNet that takes more than latents: 8 channels as instruct-pix2pix has them, 9 as inpainting has them."""
    return fixed_weights(UNet2DConditionModel(**(ONE_LEVEL | {"in_channels": channels})))


def tiny_vae() -> AutoencoderTiny:
    """A TAESD of 2 pixels per latent."""
    return fixed_weights(AutoencoderTiny(**small_bundles.TINY_VAE))


def embedded_pipeline(**unet: Any) -> LatentConsistencyModelPipeline:
    """The small pipeline as one of LCM's: its UNet takes the guidance scale as an embedding of 8 numbers."""
    parts = small_pipeline(**(ONE_LEVEL | {"time_cond_proj_dim": 8} | unet)).components
    parts["scheduler"] = LCMScheduler.from_config(parts["scheduler"].config)
    found = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def variant_pipeline(name: str) -> Any:
    """A pipeline beyond text-to-image by the name of its bundle, `variant_bundle`."""
    pipe = small_pipeline()
    if name == "cached":
        return pipe
    if name == "controlnet":
        return with_controlnet(pipe)
    if name == "taesd":
        pipe.vae = tiny_vae()
        return pipe
    if name == "embedded":
        return embedded_pipeline()
    kind: Any = {"pix2pix": StableDiffusionInstructPix2PixPipeline, "inpaint": StableDiffusionInpaintPipeline}[name]
    parts = pipe.components | {"unet": wide_unet(8 if name == "pix2pix" else 9)}
    found = kind(**parts, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def variant_bundle(name: str) -> Path:
    """Its bundle, exported and checked once per test run; what it shares with `small_bundle` is taken from there."""
    special = {"hidden_states": name == "controlnet", "step_caching": name == "cached"}
    options: dict[str, Any] = {**special, "reuse": [small_bundle().path]}
    return made_once(f"exported-{name}", lambda path: export_pipeline(variant_pipeline(name), path, **options))


def references(module: torch.nn.Module, contract: Contract) -> list[Reference]:
    """PyTorch's answers of a float32 module to the gate's own cases."""
    config = module_config(module)
    cases = parity_cases(contract, config)
    inputs = [case_inputs(contract, case, config) for case in cases]
    exact = run_eager(graph_module(contract, module), inputs, torch.float32)
    return [Reference(*row) for row in zip(cases, inputs, exact, exact, strict=True)]
