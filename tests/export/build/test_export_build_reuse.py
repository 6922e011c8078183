"""When an exported bundle is used again, and every reason in words when it is not; caches that are not the bundle's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from graph_bundles import CONFIGS, graph_bundle
from small_exports import small_bundle, small_pipeline

from export.build.estimate import estimate
from export.build.ranges import Typed, default_ranges, to_ranges
from export.build.request import requests_for
from export.pipeline import export_reasons, versions
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import largest_tensor
from sdkd.core.contract import static_contract
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import InputError
from sdkd.models.resolve import resolve
from sdkd.targets.plan import plan_for_model
from sdkd.targets.registry import cache_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pipeline that the small bundle was exported from."""
    folder = tmp_path_factory.mktemp("model") / "small"
    small_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def exported(model: str) -> Bundle:
    """The small bundle, as if exported from the folder and not from the pipeline in memory."""
    bundle, digests = small_bundle(), resolve(model).digests
    records = {
        name: replace(record, source_sha256=digests[name]) for name, record in bundle.manifest.components.items()
    }
    return replace(bundle, manifest=replace(bundle.manifest, components=records))


def test_the_same_is_used_again(exported: Bundle, model: str) -> None:
    assert export_reasons(exported, resolve(model), plan_for_model("onnxruntime")) == []


def test_every_reason_is_given(exported: Bundle, model: str) -> None:
    records = dict(exported.manifest.components)
    records["unet"] = replace(records["unet"], source_sha256="0", precision="fp16", opset=24)
    del records["vae_encoder"]
    manifest = replace(exported.manifest, components=records, versions=versions() | {"torch": "2.0"})
    assert export_reasons(replace(exported, manifest=manifest), resolve(model), plan_for_model("onnxruntime")) == [
        "other weights (unet, vae_encoder)",
        "precision fp16, not fp32",
        "unet in opset 24, later than 23",
        f"torch 2.0, here it is {versions()['torch']}",
    ]


def test_caches_are_the_users_and_not_the_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/sdkd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sdkd"


# Exports with fixed shapes

FIXED = ShapeRanges(Range.fixed(1), Range.fixed(32), Range.fixed(64), Range.fixed(77))


@pytest.fixture
def fixed(tmp_path: Path) -> Bundle:
    """A bundle whose UNet says that its shapes are fixed."""
    bundle = graph_bundle(tmp_path / "bundle")
    record = bundle.component("unet")
    changed = replace(
        record, contract=static_contract(record.contract, FIXED, 2, 77), details={"static": FIXED.to_json()}
    )
    components = {**bundle.manifest.components, "unet": changed}
    return replace(bundle, manifest=replace(bundle.manifest, components=components))


def test_fixed_shapes_are_the_default_and_the_only_ones(fixed: Bundle) -> None:
    assert default_ranges(fixed) == FIXED
    assert to_ranges(Typed(("32x64",), batch="1"), fixed) == FIXED
    with pytest.raises(
        InputError,
        match=r"was exported for fixed shapes, batch 1, height 32 px, width 64 px, 77 tokens, and not for batch 1\.\.4"
        r", height 32 px, .*: leave the shapes out, or export it again without --static",
    ):
        to_ranges(Typed(("32x64",), batch="1..4"), fixed)


def test_fixed_shapes_are_estimated_too(fixed: Bundle) -> None:
    (request,) = requests_for(fixed, plan_for_model("onnxruntime"), None, ["unet"])
    sizes = {"batch": 2, "height": 16, "width": 32}
    scores = largest_tensor("unet", CONFIGS["unet"], sizes, fused=False).elements
    assert scores == 2 * 8 * 512**2
    assert estimate(fixed, request).host == 300_000_000 + 3 * request.component.total_bytes + 8 * scores
