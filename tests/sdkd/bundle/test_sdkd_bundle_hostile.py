"""Bundles that are damaged or made to harm: refused at the door, with the file and the key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from graph_bundles import graph_bundle

from sdkd.bundle.manifest import Bundle, EngineRecord, FileRecord
from sdkd.core.numbers import config_problem
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, ModelError
from sdkd.models.diffusers_folder import check_pipeline_folder

RANGES = ShapeRanges(Range(1, 1, 2), Range.fixed(64), Range.fixed(64), Range.fixed(77))
FLAGS = {"config": {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Hand-written graphs, an engine's record, a scheduler and a tokenizer; all small files are in the manifest."""
    made = graph_bundle(tmp_path / "bundle", components=("unet", "vae_decoder"))
    for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        (made.path / name).parent.mkdir()
        (made.path / name).write_text('{"num_train_timesteps": 1000}')
    unet = made.component("unet")
    engine = EngineRecord(
        "unet", "openvino", "fp32", unet.files, unet.onnx_sha256, RANGES, {}, 1.0, FLAGS, slot="openvino"
    )
    Bundle(made.path, made.manifest.with_engine(engine)).with_rest().save()
    return Bundle.open(made.path)


UNET, ENGINE = ("components", "unet"), ("engines", "openvino/unet")


ODD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("components",), [], "components is a list, not an object"),
    (("source",), "x", "source is 'x', not an object"),
    (("schema",), True, "schema is True, not a whole number"),
    (("files", 0, "sha256"), ["a"], r"files\[0\].sha256 is a list, not text"),
    ((*UNET, "opset"), "18", "components.unet.opset is '18', not a whole number"),
    ((*UNET, "seconds"), ..., "components.unet.seconds is missing"),
    ((*UNET, "seconds"), {}, "components.unet.seconds is an object, not a finite number"),
    ((*UNET, "precision"), "int4", "components.unet.precision is 'int4', not one of fp32"),
    ((*UNET, "files"), [], "components.unet.files is empty"),
    ((*UNET, "extra"), 1, "components.unet.extra is unknown"),
    ((*UNET, "program"), "x", "components.unet.program is 'x', not"),
    ((*UNET, "contract", "inputs", 0, "dtype"), "load", "dtype of sample is 'load', not one of float32"),
    ((*UNET, "contract", "inputs", 0, "axes"), ["batch", 0], "sample has the axis 0, which is neither"),
    ((*UNET, "contract", "inputs", 0, "axes"), ["batch", 1 << 40], "sample has the axis 1099511627776"),
    ((*UNET, "contract", "outputs", 0, "axes"), ["height * 1000"], r"has the axis 'height \* 1000'"),
    ((*UNET, "contract", "inputs", 0, "axes"), ["evil"], "has the axis 'evil'"),
    ((*ENGINE, "ranges", "batch"), [1, 2], r"ranges.batch has 2 items instead of 3"),
    ((*ENGINE, "ranges", "batch"), [0, 1, 2], r"range 0..1..2 is not ordered"),
    ((*ENGINE, "flags", "config"), {"CACHE_DIR": "/x"}, r"flags.config is .*CACHE_DIR.* it can have INFERENCE_PREC"),
    ((*ENGINE, "flags", "options"), ["refit"], r"flags.options is \['refit'\], it can be options by name alone"),
    ((*ENGINE, "environment"), {"cpu": 3}, "environment.cpu is 3, not text"),
]


def test_a_manifest_of_odd_types_names_the_key(bundle: Bundle) -> None:
    file = bundle.path / "bundle.json"
    kept = file.read_text()
    for keys, value, message in ODD:
        data = row = json.loads(kept)
        for key in keys[:-1]:
            row = row[key]
        row[keys[-1]] = value
        if value is ...:
            del row[keys[-1]]
        file.write_text(json.dumps(data))
        with pytest.raises(BundleError, match=rf"bundle.json of .* is damaged \(.*{message}"):
            Bundle.open(bundle.path)
    file.write_text(json.dumps(json.loads(kept) | {"later": 1}))  # keys of later versions are left alone
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scheduler/scheduler_config.json", lambda f: f.write_text(f.read_text().replace("1", "2")), "was altered"),
        ("unet/config.json", lambda f: f.write_text("{}"), "has 2 bytes instead of"),
        ("tokenizer/vocab.json", Path.unlink, "is missing"),
        ("tokenizer/vocab.json", fifo, "is missing"),
        ("tokenizer/added_tokens.json", lambda f: f.write_text("{}"), "is not in the manifest"),
    ],
)
def test_small_files_are_those_that_were_exported(
    bundle: Bundle, name: str, change: Callable[[Path], Any], message: str
) -> None:
    change(bundle.path / name)
    with pytest.raises(BundleError, match=rf"{name} {message}.*restore it, or make all again: sdkd export graphs"):
        Bundle.open(bundle.path)


def test_bundles_of_before_open_unchecked_but_wait_for_no_fifo(bundle: Bundle) -> None:
    file = bundle.path / "bundle.json"
    data = json.loads(file.read_text())
    del data["files"]
    file.write_text(json.dumps(data))
    (bundle.path / "tokenizer" / "added_tokens.json").write_text("{}")
    assert Bundle.open(bundle.path).manifest.files is None
    fifo(bundle.path / "tokenizer" / "vocab.json")
    with pytest.raises(BundleError, match=r"tokenizer/vocab\.json is not in the manifest"):
        Bundle.open(bundle.path)


def test_a_graph_may_use_the_files_of_its_record_alone(bundle: Bundle) -> None:
    record = bundle.component("unet")
    bundle.verify_weights(record)
    graph, data = (bundle.path / file.path for file in record.files)
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "other.data"
    data.with_name("other.data").write_bytes(data.read_bytes())
    graph.write_bytes(model.SerializeToString())
    files = (FileRecord.of(bundle.path, graph), FileRecord.of(bundle.path, data))
    changed = EngineRecord("unet", "onnxruntime", "fp32", files, "x", RANGES, {}, 1.0, slot="onnxruntime")
    bundle.verify_files(changed)
    with pytest.raises(
        BundleError, match=r"in 'other\.data', which the manifest does not list: do not trust this bundle"
    ):
        bundle.verify_weights(changed)


def test_advice_is_a_command_whatever_the_bundle_says(bundle: Bundle) -> None:
    for model, shown in (("x; rm -rf ~", "'x; rm -rf ~'"), ("a\x1b[2Jb", "MODEL")):
        bundle.manifest.source["model"] = model  # type: ignore[index]
        (bundle.path / "unet/model.onnx").write_bytes(b"")
        with pytest.raises(BundleError, match=rf"sdkd export {shown} "):
            bundle.verify_files(bundle.component("unet"))


NUMBERS = [
    ({"attention_head_dim": 0}, "attention_head_dim 0 is too small"),
    ({"attention_head_dim": [8, 0]}, "attention_head_dim 0 is too small"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is too large"),
    ({"layers_per_block": -1}, "layers_per_block -1 is too small"),
    ({"in_channels": "4"}, "in_channels '4' is not a number"),
    ({"in_channels": True}, "in_channels True is not a number"),
    ({"scaling_factor": 0}, "scaling_factor 0 is too small: give a number above"),
    ({"scaling_factor": float("nan")}, "scaling_factor nan is not finite"),
    ({"block_out_channels": [1] * 40}, "block_out_channels has 40 levels"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000 is too large"),
]


def test_numbers_of_a_model_are_bounded() -> None:
    for config, message in NUMBERS:
        assert config_problem(config).startswith(message)


def test_a_model_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    from sdkd.models.resolve import DEMO_WEIGHTS

    for part in DEMO_WEIGHTS.iterdir():
        (tmp_path / part.name).symlink_to(part)
    check_pipeline_folder(tmp_path)
    for name, changes, message in (
        ("vae/config.json", {"scaling_factor": 0.0}, r"vae/config.json': scaling_factor 0.0 is too small"),
        ("scheduler/scheduler_config.json", {"beta_end": 2}, "beta_end 2 is too large"),
        (
            "model_index.json",
            {"tokenizer": ["transformers", "EvilTokenizer"]},
            "the tokenizer of .* is an EvilTokenizer",
        ),
        ("model_index.json", {"scheduler": ["diffusers", "AutoencoderKL"]}, "the scheduler of .* is an AutoencoderKL"),
    ):
        folder, file = (tmp_path / name).parent, tmp_path / name
        kept = file.read_bytes()
        if folder != tmp_path:
            folder.unlink()
            folder.mkdir()
            for other in (DEMO_WEIGHTS / folder.name).iterdir():
                (folder / other.name).symlink_to(other)
        file.unlink()
        file.write_text(json.dumps(json.loads(kept) | changes))
        with pytest.raises(ModelError, match=message):
            check_pipeline_folder(tmp_path)
        file.write_bytes(kept)
    os.mkfifo(tmp_path / "vae" / "pipe")
    with pytest.raises(ModelError, match="pipe' is no regular file"):
        check_pipeline_folder(tmp_path)
