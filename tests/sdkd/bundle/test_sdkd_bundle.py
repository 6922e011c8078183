from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sdkd.bundle.manifest import Bundle, ComponentRecord, EngineRecord, FileRecord, Manifest
from sdkd.core.components import vae_decoder_contract
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, StaleEngineError

VAE = {"latent_channels": 4, "out_channels": 3, "block_out_channels": [8, 16]}
RANGES = ShapeRanges(Range(1, 1, 2), Range.fixed(64), Range.fixed(64), Range.fixed(77))
HERE = {"tensorrt_rtx": "1.7.1", "platform": "linux-x86_64"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of one component and one engine, with real files."""
    graph, engine = tmp_path / "vae_decoder/model.onnx", tmp_path / "engines/tensorrt-rtx/vae_decoder.engine"
    for file in (graph, engine):
        file.parent.mkdir(parents=True)
        file.write_bytes(file.name.encode() * 100)
    component = ComponentRecord(
        name="vae_decoder",
        contract=vae_decoder_contract(VAE, "fp16"),
        precision="fp16",
        opset=18,
        files=(FileRecord.of(tmp_path, graph),),
        source_sha256="0" * 64,
        parameters=10,
        seconds=1.5,
        parity={"max_abs": 1e-4},
    )
    record = EngineRecord(
        component="vae_decoder",
        target="tensorrt-rtx",
        precision="fp16",
        files=(FileRecord.of(tmp_path, engine),),
        onnx_sha256=component.onnx_sha256,
        ranges=RANGES,
        environment=HERE,
        seconds=2.0,
        built_for=("8.6", "8.9"),
        slot="tensorrt-rtx",
    )
    manifest = Manifest({"model": "m"}, {"sdkd": "0"}, {"vae_decoder": component}).with_engine(record)
    Bundle(tmp_path, manifest).save()
    return Bundle.open(tmp_path)


def test_a_manifest_survives_the_disk(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    assert again.slots() == ("tensorrt-rtx",)
    assert again.engine("tensorrt-rtx", "vae_decoder").ranges == RANGES


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle \(no bundle\.json\): make one with: sdkd export"):
        Bundle.open(tmp_path)


def test_a_manifest_that_cannot_be_read_is_refused(bundle: Bundle) -> None:
    path = bundle.path / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(BundleError, match="has manifest schema 99, this sdkd reads 1"):
        Bundle.open(bundle.path)
    for text in ("{", "[]", '{"schema": 1}'):
        path.write_text(text)
        with pytest.raises(BundleError, match=r"bundle\.json of .* is damaged"):
            Bundle.open(bundle.path)


def test_files_that_are_not_what_was_written_are_named(bundle: Bundle) -> None:
    component, engine = bundle.component("vae_decoder"), bundle.engine("tensorrt-rtx", "vae_decoder")
    bundle.verify_files(component)
    bundle.verify_files(engine)
    (bundle.path / engine.files[0].path).write_bytes(b"short")
    with pytest.raises(BundleError, match=r"has 5 bytes instead of 1800 .*sdkd build-engine .* --target tensorrt-rtx"):
        bundle.verify_files(engine)
    graph = bundle.path / component.files[0].path
    before = graph.stat().st_mtime_ns
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    os.utime(graph, ns=(before, before))  # what was hashed once is hashed again all the same
    with pytest.raises(BundleError, match=r"was altered: its SHA-256 differs.*sdkd export m .* --overwrite"):
        bundle.verify_files(component)
    graph.unlink()
    with pytest.raises(BundleError, match=r"vae_decoder/model\.onnx is missing"):
        bundle.verify_files(component)
    with pytest.raises(BundleError, match=r"has no openvino engine for vae_decoder \(built so far: tensorrt-rtx\)"):
        bundle.engine("openvino", "vae_decoder")
    with pytest.raises(BundleError, match=r"has no component 'unet' \(it has vae_decoder\)"):
        bundle.component("unet")


def test_an_engine_of_another_version_gpu_or_weights_is_stale(bundle: Bundle) -> None:
    record = bundle.engine("tensorrt-rtx", "vae_decoder")
    bundle.check_fresh(record, HERE | {"compute_capability": "8.9"})
    for here, message in (
        ({"tensorrt_rtx": "1.6.0"}, r"built with tensorrt rtx 1\.7\.1, here it is 1\.6\.0\. Rebuild"),
        ({"compute_capability": "9.0"}, r"built for compute capability 8\.6, 8\.9, here it is 9\.0"),
    ):
        with pytest.raises(StaleEngineError, match=message):
            bundle.check_fresh(record, HERE | here)
    stale = replace(record, onnx_sha256="other")
    assert bundle.stale_reasons(stale) == ["vae_decoder was exported again after the engine was built"]


COMPONENT, ENGINE = ("components", "vae_decoder"), ("engines", "tensorrt-rtx/vae_decoder")
OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "\\\\host\\x", "out/secret", "", "a\0b", "loop"]


def test_names_that_lead_out_of_the_bundle_are_refused(bundle: Bundle) -> None:
    (bundle.path.parent / "secret").write_text("secret")
    (bundle.path / "out").symlink_to(bundle.path.parent)
    (bundle.path / "loop").symlink_to(bundle.path / "loop")
    file, places = bundle.path / "bundle.json", [(*COMPONENT, "name")]
    places += [(*ENGINE, key) for key in ("component", "slot", "target")]
    cases = [((*place, "files", "0", "path"), path) for place in (COMPONENT, ENGINE) for path in OUTSIDE]
    cases += [(place, name) for place in places for name in ("../x", "..", "a/b", "a\\b", "C:x", "")]
    cases += [((*COMPONENT, "program"), {"path": path, "bytes": 1, "sha256": "0" * 64}) for path in OUTSIDE]
    kept = file.read_text()
    for path, value in cases:
        data = row = json.loads(kept)
        for key in path[:-1]:
            row = row[int(key)] if isinstance(row, list) else row[key]
        row[path[-1]] = value
        file.write_text(json.dumps(data))
        with pytest.raises(BundleError, match=r"names .*, which does not stay inside the bundle's folder: do not"):
            Bundle.open(bundle.path)


def test_links_inside_the_bundle_are_followed(bundle: Bundle, tmp_path: Path) -> None:
    graph = bundle.path / bundle.component("vae_decoder").files[0].path
    graph.rename(graph.with_name("real.onnx"))
    graph.symlink_to(graph.with_name("real.onnx"))
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(bundle.path)
    opened = Bundle.open(link)
    opened.verify_files(opened.component("vae_decoder"))
