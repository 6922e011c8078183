"""What a bundle must hold for libraries older than ours, and the environment that has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_bundles
from diffusers import StableDiffusionPipeline
from interop_environment import EnvironmentFailedError, interop_python
from transformers import CLIPImageProcessor

from export import export_pipeline
from sdkd.core.files import read_json


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = small_bundles.small_pipeline().components | {"feature_extractor": CLIPImageProcessor()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("interop") / "bundle"
    return export_pipeline(pipe, folder, components=("text_encoder",), verify=False).path


def test_the_tokenizer_is_there_in_both_forms(bundle: Path) -> None:
    vocabulary = read_json(bundle / "tokenizer" / "vocab.json")
    assert vocabulary == read_json(bundle / "tokenizer" / "tokenizer.json")["model"]["vocab"]
    assert vocabulary["<|endoftext|>"] == 513
    assert (bundle / "tokenizer" / "merges.txt").read_text().startswith("#version")


def test_the_index_names_only_what_the_bundle_can_hold(bundle: Path) -> None:
    index = json.loads((bundle / "model_index.json").read_text())
    absent = {name: index[name] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    assert absent == {name: [None, None] for name in absent}
    assert index["requires_safety_checker"] is False
    assert not (bundle / "feature_extractor").exists()
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]


@pytest.mark.interop
def test_an_environment_that_cannot_be_made_says_what_pip_said(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("./not-there\n")
    with pytest.raises(
        EnvironmentFailedError, match=r"could not be made; is there a network\? pip said: ERROR: .*not-there"
    ):
        interop_python(tmp_path / "venv", requirements)
    assert not (tmp_path / "venv" / ".requirements").exists()


@pytest.mark.interop
def test_an_environment_is_re_used_until_its_requirements_change(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n")
    python = interop_python(tmp_path / "venv", requirements)
    (tmp_path / "venv" / "mark").touch()
    assert interop_python(tmp_path / "venv", requirements) == python
    assert (tmp_path / "venv" / "mark").exists()
    requirements.write_text("# something else\n")
    interop_python(tmp_path / "venv", requirements)
    assert not (tmp_path / "venv" / "mark").exists()
