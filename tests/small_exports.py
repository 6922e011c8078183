"""A two-level pipeline that exports in seconds, and its bundle, made once per test run."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir
import small_bundles
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import fixed_weights, tiny_text_encoder, tiny_tokenizer
from made_once import made_once

from export.components import component_module, graph_module, module_contract
from export.parity import Reference, case_inputs, parity_cases, run_eager
from export.precision import cast
from export.to_onnx import GRAPH, OnnxGraph, save, to_onnx
from sdkd.bundle import Bundle
from sdkd.contract import Contract
from sdkd.exportable import module_config
from sdkd.files import read_json, write_json
from sdkd.onnx_weights import TRANSFORMS_FILE

VAE: dict[str, Any] = small_bundles.VAE | {"scaling_factor": 0.5}


def small_pipeline(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """A whole pipeline for images of 32x32 pixels: 2 levels, no mid block."""
    return StableDiffusionPipeline(
        vae=fixed_weights(AutoencoderKL(**VAE), seed + 1),
        text_encoder=tiny_text_encoder(seed + 2),
        tokenizer=tiny_tokenizer(),
        unet=fixed_weights(UNet2DConditionModel(**(small_bundles.UNET | unet)), seed),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def small_bundle() -> Bundle:
    """The exported pipeline in float32, checked; read it, do not change it."""
    from export import export_pipeline

    return Bundle.open(made_once("exported", lambda path: export_pipeline(small_pipeline(), path)))


def bundle_copy(folder: Path) -> Bundle:
    """A bundle of one's own."""
    shutil.copytree(small_bundle().path, folder)
    return Bundle.open(folder)


@cache
def small_graph(component: str) -> tuple[torch.nn.Module, OnnxGraph, Contract, Path]:
    """One component of the bundle: its module, graph, contract, and the graph's file."""
    bundle = small_bundle()
    record, file = bundle.component(component), bundle.path / component / GRAPH
    transforms, unmatched = read_json(file.parent / TRANSFORMS_FILE), tuple(record.details["unmatched_weights"])
    graph = OnnxGraph(onnx_ir.load(file), record.opset, transforms, unmatched, record.details["float32_nodes"])
    return component_module(small_pipeline(), component), graph, record.contract, file


@cache
def half_unet() -> tuple[torch.nn.Module, OnnxGraph, Contract, Path]:
    """The UNet in fp16, as `small_graph` gives it."""
    module = cast(small_pipeline().unet, "fp16")
    contract = module_contract("unet", module, "fp16")
    graph = to_onnx(module, contract, module_config(module))
    folder = Path(tempfile.mkdtemp())
    (file,) = save(graph, folder)
    write_json(folder / TRANSFORMS_FILE, dict(graph.transforms))
    return module, graph, contract, file


def references(module: torch.nn.Module, contract: Contract) -> list[Reference]:
    """PyTorch's answers of a float32 module to the gate's own cases."""
    config = module_config(module)
    cases = parity_cases(contract, config)
    inputs = [case_inputs(contract, case, config) for case in cases]
    exact = run_eager(graph_module(contract, module), inputs, torch.float32)
    return [Reference(*row) for row in zip(cases, inputs, exact, exact, strict=True)]
