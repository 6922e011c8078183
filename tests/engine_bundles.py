"""Bundles with engines for the tests of `engines`: of hand-written graphs, and of a whole small pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from graph_bundles import graph_bundle
from made_once import made_once
from onnx import TensorProto, helper
from small_exports import bundle_copy, variant_bundle
from traced_programs import with_program

from export import build_engine
from sdkd.bundle.manifest import Bundle, ComponentRecord, EngineRecord, FileRecord, Manifest
from sdkd.core.components import unet_contract
from sdkd.core.contract import DTYPES, Precision
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.targets.registry import built_environment

CONTEXT = 32
TARGETS = ("onnxruntime", "openvino")
EVERY = (*TARGETS, "inductor")  # every one that runs on a CPU; the last takes a minute for a whole pipeline
RANGES = ShapeRanges(Range(1, 1, 2), Range(32, 32, 64), Range(32, 32, 64), Range.fixed(77))


def graph_unet(
    folder: Path, precision: Precision = "fp32", targets: Sequence[str] = EVERY, ranges: ShapeRanges = RANGES
) -> Bundle:
    """A hand-written UNet of two levels, 2 pixels per latent, and its engines; no other engine."""
    bundle = with_program(graph_bundle(folder, precision, ("unet", "vae_decoder", "text_encoder")))
    for target in targets:
        bundle = build_engine(bundle, target, precision=precision, ranges=ranges, components=("unet",))
    return bundle


def reference(bundle: Bundle, component: str, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    """First output of the exported graph, run plainly by ONNX Runtime."""
    import onnxruntime

    path = bundle.path / bundle.component(component).files[0].path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.detach().numpy() for name, tensor in feeds.items()})[0])


def unet_feeds(precision: Precision = "fp32", batch: int = 2, size: int = 16) -> dict[str, torch.Tensor]:
    """Latents, timestep and text of a UNet call; `size` in latents."""
    generator = torch.Generator().manual_seed(batch)
    dtype = getattr(torch, DTYPES[precision])
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator).to(dtype),
        "timestep": torch.tensor(250.0),
        "encoder_hidden_states": torch.randn(batch, 77, CONTEXT, generator=generator).to(dtype),
    }


def identity_unet(folder: Path, precision: Precision, target: str) -> Bundle:
    """A bundle whose UNet gives its latents back, in a dtype that few CPU kernels know."""
    bundle = graph_bundle(folder, "fp32", ("unet", "vae_decoder"))
    contract = unet_contract(bundle.config("unet"), precision)
    kinds = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
    infos = [
        helper.make_tensor_value_info(spec.name, kinds[spec.dtype], list(spec.axes))
        for spec in (*contract.inputs, *contract.outputs)
    ]
    nodes = [helper.make_node("Identity", ["sample"], ["out_sample"])]
    model = helper.make_model(
        helper.make_graph(nodes, "identity", infos[:3], infos[3:]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, folder / "unet" / "model.onnx")
    files = (FileRecord.of(folder, folder / "unet" / "model.onnx"),)
    component = ComponentRecord("unet", contract, precision, 18, files, "0" * 64, 0, 0.0)
    engine = folder / "engines" / target / f"unet{'.onnx' if target == 'onnxruntime' else '.xml'}"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(model.SerializeToString())
    record = EngineRecord(
        "unet", target, precision, (FileRecord.of(folder, engine),), component.onnx_sha256, RANGES,
        built_environment(target), 0.0, {"config": {"INFERENCE_PRECISION_HINT": "f32"}}, slot=target,
    )  # fmt: skip
    result = Bundle(folder, Manifest({"model": "identity"}, {}, {"unet": component}).with_engine(record))
    result.save()
    return result


def pipeline_bundle(folder: Path, targets: Sequence[str] = EVERY) -> Path:
    """The small pipeline as the exporter writes it, with engines for every CPU target: 32 to 64 px, up to 2 images."""
    bundle = bundle_copy(folder)
    for target in targets:
        bundle = build_engine(bundle, target, ranges=RANGES)
    return bundle.path


def without_slot(source: Path, folder: Path, slot: str) -> Bundle:
    """A copy of a bundle without the engines of a slot."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "engines" / slot)
    bundle = Bundle.open(folder)
    kept = {name: record for name, record in bundle.manifest.engines.items() if record.slot != slot}
    changed = replace(bundle, manifest=replace(bundle.manifest, engines=kept))
    changed.save()
    return changed


def variant_engines(name: str, targets: Sequence[str] = TARGETS) -> Path:
    """Engines of a `variant_bundle`, made once per test run: `RANGES`, and prompts of one or two parts."""
    ranges = replace(RANGES, sequence=Range(77, 77, 154))

    def build(folder: Path) -> None:
        shutil.copytree(variant_bundle(name), folder)
        for target in targets:
            build_engine(folder, target, ranges=ranges)

    return made_once("-".join((name, *targets)), build)


def edit_engine(bundle: Path, slot: str, component: str, **changes: Any) -> Bundle:
    """Rewrite one engine's record in the manifest."""
    opened = Bundle.open(bundle)
    edited = Bundle(bundle, opened.manifest.with_engine(replace(opened.engine(slot, component), **changes)))
    edited.save()
    return edited


def replace_file(bundle: Path, slot: str, component: str, data: bytes) -> Bundle:
    """Put other bytes where an engine's file is, and make the manifest agree with them."""
    path = bundle / Bundle.open(bundle).engine(slot, component).files[0].path
    path.write_bytes(data)
    return edit_engine(bundle, slot, component, files=(FileRecord.of(bundle, path),))
