"""The traced program beside a graph: kept without weights, without this machine's paths, read with the graph's own."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from graph_bundles import graph_bundle
from small_exports import small_bundle, small_pipeline
from traced_programs import with_program

from export.check.parity import case_inputs, parity_cases
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import torch_weights, weight_names
from sdkd.bundle.program import PROGRAM_FILE, read_program
from sdkd.errors import BundleError


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder", "vae_encoder"])
def test_with_the_graphs_weights_it_computes_what_the_graph_does(component: str) -> None:
    import onnxruntime

    bundle = small_bundle()
    file, contract = bundle.path / component / "model.onnx", bundle.component(component).contract
    weights = torch_weights(file)
    program = read_program(file.with_name(PROGRAM_FILE), weights)
    inputs = case_inputs(contract, parity_cases(contract, bundle.config(component))[0], bundle.config(component))
    with torch.no_grad():
        found = program.module()(*inputs)[0]
    feeds = {spec.name: value.numpy() for spec, value in zip(contract.inputs, inputs, strict=True)}
    expected = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_it_holds_neither_weights_nor_paths_of_the_machine_that_made_it() -> None:
    bundle = small_bundle()
    record = bundle.component("unet").program
    assert record is not None
    assert record.path == "unet/program.pt2"
    file = bundle.path / record.path
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    weights = [data for name, data in contents.items() if "/weights/" in name and not name.endswith(".json")]
    assert set(map(len, weights)) == {4}  # one number stands for all of a weight's
    assert not any(any(data) for data in weights)
    assert not [name for name, data in contents.items() if b"site-packages" in data or b"/export/" in data]


def test_weights_come_from_the_graph_in_their_own_shapes() -> None:
    bundle = small_bundle()
    file = bundle.path / "unet" / "model.onnx"
    found = torch_weights(file)
    assert set(found) == weight_names(file)
    state = small_pipeline().unet.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    bundle = with_program(graph_bundle(tmp_path / "bundle"))
    file = bundle.path / "unet" / PROGRAM_FILE
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(BundleError, match=r"program.pt2' cannot be read by torch .*: export the model again"):
        read_program(file, {})


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    bundle = with_program(graph_bundle(tmp_path / "bundle"))
    weights = torch_weights(bundle.path / "unet" / "model.onnx", ["conv"])
    with pytest.raises(
        BundleError, match=r"takes the weight 'module.to_out' as \(32, 4\) .* lacks it: export the model"
    ):
        read_program(bundle.path / "unet" / PROGRAM_FILE, weights)


def test_the_manifest_knows_it_apart_from_the_files_of_the_graph(tmp_path: Path) -> None:
    bundle = with_program(graph_bundle(tmp_path / "bundle"))
    again = Bundle.open(bundle.path).component("unet")
    assert again.program is not None
    assert again.program.path not in [file.path for file in again.files]
