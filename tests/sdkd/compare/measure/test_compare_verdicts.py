"""The rules on engine images."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdkd.compare.measure.quality import ImageLikeness, Likeness, Verdict, judge_engine
from sdkd.compare.measure.subjects import Subject


def engine(precision: str) -> Subject:
    return Subject("tiny engine", "tiny", "openvino", precision, Path("bundle"))


def at(*values: float | None) -> Likeness:
    return Likeness("tiny eager", tuple(ImageLikeness(value, value is None, 0) for value in values))


@pytest.mark.parametrize(
    ("values", "ok", "found"),
    [
        ((40.0, 55.0), True, "worst image 40.0 dB"),
        ((39.94, 90.0), False, "worst image 39.9 dB"),
        ((None, None), True, "worst image identical"),
        ((None, 41.0), True, "worst image 41.0 dB"),
    ],
)
def test_every_fp32_image_is_at_least_40_db(values: tuple[float | None, ...], ok: bool, found: str) -> None:
    verdict = judge_engine(engine("fp32"), at(*values), None)
    assert verdict == Verdict(ok, "every image is at least 40 dB PSNR from eager fp32", found)


@pytest.mark.parametrize(("mean", "ok"), [(35.0, True), (29.5, True), (28.9, False)])
def test_a_half_engine_is_no_further_than_eager_half_within_one_db(mean: float, ok: bool) -> None:
    verdict = judge_engine(engine("bf16"), at(mean - 2, mean + 2), at(30.0, 30.0))
    assert verdict is not None
    assert verdict.ok is ok
    assert verdict.rule == "no further from eager fp32 than eager bf16 is, within 1 dB of mean PSNR"
    assert verdict.found == f"{mean:.1f} dB, eager bf16 30.0 dB"


def test_what_cannot_be_judged_is_not_called_right() -> None:
    assert judge_engine(engine("fp32"), None, None) == Verdict(
        None, "every image is at least 40 dB PSNR from eager fp32", "no eager images to compare with"
    )
    half = judge_engine(engine("fp16"), at(30.0), None)
    assert half is not None
    assert (half.ok, half.found) == (None, "no eager fp16 images to compare with")


def test_eager_is_the_measure_and_gets_no_verdict() -> None:
    assert judge_engine(Subject("tiny eager", "tiny"), None, None) is None
