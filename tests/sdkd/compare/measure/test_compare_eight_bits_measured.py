"""Engines in eight bits as subjects, measured: planned from a bundle, and judged by eager half precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from compare_models import engine_models
from quantized_records import planted_engine

import export.check.half_products as products
from sdkd.bundle.manifest import Bundle
from sdkd.compare import Subject, compare
from sdkd.compare.measure.outcome import change_between
from sdkd.compare.measure.planning import Wish, make_plan
from sdkd.compare.measure.results import Report
from sdkd.errors import InputError

SLOT = "onnxruntime-int8"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Engines of ONNX Runtime that a record calls int8, too: their images are those of eager PyTorch."""
    copy = shutil.copytree(engine_models() / "bundle", tmp_path_factory.mktemp("eight") / "small")
    return planted_engine(Bundle.open(copy), SLOT)


@pytest.fixture(scope="module")
def report(bundle: Bundle) -> Report:
    wish = Wish(("eager", "onnxruntime", SLOT), None, (32, 32), bundle.path.parent)
    plan = make_plan([str(bundle.path)], wish)
    labels = [subject.label for subject in plan.subjects]
    usual: dict[str, Any] = {"prompts": ["a red star"], "steps": 2, "runs": 3, "min_seconds": 0.0}
    return compare(plan.subjects, staircase=labels, **usual)


def test_a_bundle_brings_them_and_their_latents_are_in_half_precision(report: Report) -> None:
    row = report.results[-1]
    assert (row.subject.label, row.subject.target) == (f"small {SLOT}", SLOT)
    assert (row.subject.precision, row.subject.judged_in, row.subject.runs_as) == ("int8", "bf16", SLOT)
    assert row.rounding is not None
    assert row.rounding.quality.worst == 0.034
    assert row.verdict is not None
    assert row.verdict.ok is True
    assert row.verdict.found.startswith("as close as bf16: ")
    assert report.ok


def test_their_share_of_the_limit_is_said_to_be_unknown(report: Report) -> None:
    assert report.results[-1].limit is None
    assert report.results[0].limit is not None
    told = "int8: the machine's limit is not known, since PyTorch has no product to measure it by"
    assert report.notes.count(told) == 1
    assert "int8" not in report.ceilings


def test_a_staircase_names_the_precision_alone_where_it_is_the_same_engine(report: Report) -> None:
    changes = [stair.change for stair in report.stairs]
    assert changes[1:] == ["onnxruntime", f"int8 instead of fp32 ({SLOT})"]
    assert change_between(report.results[0], report.results[-1]) == SLOT
    assert report.stairs[-1].ok is True


def test_half_precision_that_the_cpu_has_no_units_for_is_not_computed_by_scalar_loops(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[object]()
    real = products.rounded_products
    monkeypatch.setattr(products, "has_units", lambda dtype: False)
    monkeypatch.setattr(products, "rounded_products", lambda dtype: used.append(dtype) or real(dtype))
    subject = Subject("small int8", engine_models() / "right", SLOT, "int8", bundle.path)
    found = compare([subject], prompts=["a red star"], steps=1, runs=1, image_runs=1, min_seconds=0.0).results[0]
    assert [str(dtype) for dtype in used] == ["torch.float32", "torch.bfloat16"]
    assert found.verdict is not None
    assert found.verdict.found.startswith("as close as bf16: ")


def test_only_engines_are_of_eight_bits(bundle: Bundle) -> None:
    for target in ("eager", "compile"):
        with pytest.raises(InputError, match=r"precision 'int8' is unknown: .*, then sdkd build-engine BUNDLE"):
            Subject("small", "small", target, "int8")
    with pytest.raises(InputError, match="precision 'int4' of an engine is unknown"):
        Subject("small", "small", SLOT, "int4", Path("bundle"))
    with pytest.raises(InputError, match=r"precision 'nf4' of an engine is unknown: .* nearest to it is int8"):
        make_plan([str(bundle.path)], Wish(None, "nf4", None, bundle.path.parent))
