"""Step caching at export: the UNet's second output, its last layer as a component, and bundles without both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small_exports import ONE_LEVEL, embedded_pipeline, small_bundle, small_pipeline, variant_bundle, with_controlnet
from typer.testing import CliRunner

from export import build_engine, export_pipeline
from export.build.ranges import Geometry, check_shapes, input_shapes
from export.build.tensorrt_plan import touched
from export.graph.components import LastLayer
from export.pipeline import export_reasons
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import largest_of
from sdkd.cli import app
from sdkd.core.components import CACHED_UNET, cached_unet_contract, unet_contract
from sdkd.core.conditions import Extras
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import InputError, ModelError
from sdkd.models.generation import parse_generation
from sdkd.models.resolve import resolve
from sdkd.targets.plan import plan_for_model


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The small pipeline, exported for step caching and checked."""
    return Bundle.open(variant_bundle("cached"))


def test_both_graphs_are_checked_and_have_the_units_weights_by_name(bundle: Bundle) -> None:
    unet, last = bundle.component("unet"), bundle.component(CACHED_UNET)
    config, module = bundle.config("unet"), small_pipeline().unet
    assert unet.contract == unet_contract(config, "fp32", Extras(deep_feature=True))
    assert last.contract == cached_unet_contract(config, "fp32")
    assert [spec.name for spec in unet.contract.outputs] == ["out_sample", "deep_feature"]
    assert unet.contract.outputs[1].axes == last.contract.inputs[-1].axes == ("batch", 16, "height", "width")
    for record in (unet, last):
        assert record.parity is not None
        assert record.parity["relative"] < 1e-4
        assert record.details["unmatched_weights"] == []
    assert unet.source_sha256 == last.source_sha256
    state = LastLayer(module).state_dict()
    assert last.parameters == sum(tensor.numel() for tensor in state.values()) < unet.parameters / 2
    assert {"conv_in.weight", "up_blocks.1.resnets.1.conv1.weight", "time_embedding.linear_1.bias"} <= set(state)
    for name, tensor in state.items():
        assert torch.equal(tensor, module.state_dict()[name])
    assert bundle.config(CACHED_UNET) == config


def test_a_bundle_without_it_is_as_it_was(bundle: Bundle) -> None:
    plain, cached = (onnx.load(root / "unet" / "model.onnx").graph for root in (small_bundle().path, bundle.path))
    assert [value.name for value in plain.output] == ["out_sample"]
    assert CACHED_UNET not in small_bundle().manifest.components
    assert [node.op_type for node in plain.node] == [node.op_type for node in cached.node]  # an output costs no node


def test_profiles_of_the_feature_follow_the_latents(bundle: Bundle) -> None:
    ranges = ShapeRanges(Range(1, 1, 4), Range(32, 32, 64), Range(32, 48, 64), Range.fixed(77))
    record, geometry = bundle.component(CACHED_UNET), Geometry.of(bundle)
    shapes = input_shapes(record.contract, ranges, geometry)
    assert shapes["sample"] == ((1, 4, 16, 16), (2, 4, 16, 24), (8, 4, 32, 32))
    assert shapes["deep_feature"] == ((1, 16, 16, 16), (2, 16, 16, 24), (8, 16, 32, 32))
    whole = bundle.component("unet")
    assert check_shapes(record.contract, [ranges], geometry) == check_shapes(whole.contract, [ranges], geometry)
    sizes = check_shapes(record.contract, [ranges], geometry)[0]
    assert largest_of(bundle, record, sizes, True).elements <= largest_of(bundle, whole, sizes, True).elements
    weights = {name: tensor.dim() for name, tensor in LastLayer(small_pipeline().unet).state_dict().items()}
    assert {"conv_in.weight", "up_blocks.1.attentions.1.proj_in.weight"} <= set(touched(CACHED_UNET, weights))
    assert "time_embedding.linear_1.weight" not in touched(CACHED_UNET, weights)


@pytest.mark.slow
def test_half_precision_keeps_the_feature_in_half_and_both_are_built_for_tensorrt_rtx(tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "fp16", "components": ("unet", "vae_decoder"), "step_caching": True}
    made = export_pipeline(
        small_pipeline(), tmp_path / "bundle", keep_float=["unet.up_blocks.1.attentions.0"], **options
    )
    assert tuple(made.manifest.components) == ("unet", "vae_decoder", CACHED_UNET)  # it comes with the UNet
    for name in made.manifest.components:
        record = made.component(name)
        assert record.parity is not None
        assert record.parity["finite"]
    assert made.component("unet").contract.outputs[1].dtype == "float16"
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("polygraphy")
    built = build_engine(made, "tensorrt-rtx", components=["unet", CACHED_UNET])  # no GPU is needed to build
    for name in ("unet", CACHED_UNET):
        assert built.engine("tensorrt-rtx", name).total_bytes > 100_000


@pytest.mark.parametrize(("change", "words"), [
    ({"model": lambda: embedded_pipeline()}, "this model was made for 4 steps, guidance 8.5"),
    ({"generation": parse_generation("steps=2,guidance=1,scheduler=lcm")}, "this model was made for 2 steps"),
    ({"model": lambda: with_controlnet(small_pipeline())}, "step caching does not go with a ControlNet"),
    ({"model": lambda: small_pipeline(**ONE_LEVEL)}, "needs a UNet whose last up block is a CrossAttnUpBlock2D"),
])  # fmt: skip
def test_models_that_it_does_not_suit_are_refused_before_an_export(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    options = {"model": small_pipeline} | change
    with pytest.raises(ModelError, match=words):
        export_pipeline(options.pop("model")(), tmp_path / "bundle", step_caching=True, **options)
    assert not (tmp_path / "bundle").exists()


def test_the_component_comes_with_its_option(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no component 'unet_cached': it comes with --step-caching"):
        export_pipeline(small_pipeline(), tmp_path / "bundle", components=[CACHED_UNET])
    small_pipeline().save_pretrained(tmp_path / "model")
    model, plan = resolve(tmp_path / "model"), plan_for_model("onnxruntime", None)
    assert "no graphs for step caching" in export_reasons(small_bundle(), model, plan, step_caching=True)
    assert "no graphs for step caching" not in export_reasons(bundle, model, plan, step_caching=True)
    words = ["build-engine", str(small_bundle().path), "-t", "onnxruntime", "--step-caching"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "has no graphs for step caching: export its model again with --step-caching" in " ".join(
        result.output.split()
    )
