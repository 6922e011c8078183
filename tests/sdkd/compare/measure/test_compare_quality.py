"""PSNR and SSIM against literal values, how identical images count, and the rules on engine images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdkd.bundle.quantized import Asked, Quality, Quantized, StepError
from sdkd.compare.measure.quality import (
    IDENTICAL_DB,
    ImageLikeness,
    Likeness,
    Verdict,
    difference_image,
    image_likeness,
    judge_engine,
    likeness,
    pixels,
    ssim,
)
from sdkd.compare.measure.subjects import Subject
from sdkd.errors import InputError


def grey(level: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_psnr_and_the_largest_difference_of_an_image() -> None:
    assert image_likeness(grey(100), grey(101)).psnr_db == pytest.approx(48.1308, abs=1e-4)
    assert image_likeness(grey(0), grey(255)).psnr_db == pytest.approx(0.0)
    assert image_likeness(grey(7), grey(7)) == ImageLikeness(None, True, 0)  # as in JSON: no infinity
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0, 0] = 250
    for pair in ((Image.fromarray(pixels), grey(0)), (grey(0), Image.fromarray(pixels))):
        assert image_likeness(*pair).max_abs == 250  # does not wrap around in uint8


def test_a_likeness_has_the_mean_and_the_worst_image() -> None:
    found = likeness([grey(7), grey(8), grey(11)], [grey(7)] * 3, "eager")
    assert not found.identical
    assert found.reference == "eager"
    assert found.psnr_min_db == pytest.approx(48.1308 - 20 * math.log10(4), abs=1e-4)
    assert found.psnr_mean_db == pytest.approx((IDENTICAL_DB + 48.1308 + 36.0896) / 3, abs=1e-3)
    assert found.max_abs == 4
    assert likeness([grey(1)], [grey(1)], "eager").identical


def test_images_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InputError, match=r"images of \(4, 4\) and \(8, 4\) pixels cannot be compared"):
        image_likeness(grey(0), grey(0, (8, 4)))
    for own, others in ((1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"{own} images against {others} references"):
            likeness([grey(0)] * own, [grey(0)] * others, "eager")


def noisy(seed: int, size: tuple[int, int] = (24, 30)) -> Image.Image:
    """A ramp with noise of its own."""
    ramp = np.linspace(20, 200, size[0] * size[1] * 3).reshape(*size, 3)
    noise = np.random.default_rng(seed).normal(0, 12, ramp.shape)
    return Image.fromarray((ramp + noise).clip(0, 255).round().astype(np.uint8))


def test_ssim_is_the_published_formula() -> None:
    one, other = noisy(1), noisy(2)
    flat = ssim(pixels(grey(100, (16, 16))), pixels(grey(120, (16, 16))))
    assert flat == pytest.approx((2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2))  # no structure: means alone
    assert ssim(pixels(one), pixels(one)) == 1.0
    assert ssim(pixels(one), pixels(other)) == ssim(pixels(other), pixels(one))
    assert image_likeness(one, other).ssim == ssim(pixels(one), pixels(other)) < 0.9
    assert ssim(pixels(grey(7)), pixels(grey(9))) < 1.0  # smaller than the window


def test_ssim_agrees_with_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is in the extra `train`")
    import torch

    one, other = noisy(1), noisy(2)
    tensors = [torch.from_numpy(pixels(image)).permute(2, 0, 1)[None].double() for image in (one, other)]
    _, everywhere = metrics.structural_similarity_index_measure(*tensors, data_range=255.0, return_full_image=True)
    inside = everywhere[..., 5:-5, 5:-5]  # torchmetrics mirrors the image at its edges and counts them, too
    assert ssim(pixels(one), pixels(other)) == pytest.approx(float(inside.mean()), abs=1e-6)


def test_a_perceptual_distance_is_kept_per_image_and_zero_for_equal_images() -> None:
    def distance(image: Image.Image, reference: Image.Image) -> float:
        return float(np.abs(pixels(image) - pixels(reference)).mean()) / 10

    found = likeness([grey(7), grey(8), grey(11)], [grey(7)] * 3, "eager", distance)
    assert [image.lpips for image in found.per_image] == [0.0, pytest.approx(0.1), pytest.approx(0.4)]
    assert found.lpips_mean == pytest.approx(0.5 / 3)
    assert found.lpips_max == pytest.approx(0.4)
    assert found.worst == 2
    assert likeness([grey(8)], [grey(7)], "eager").lpips_mean is None
    assert found.ssim_min == found.per_image[2].ssim < found.ssim_mean < 1


def test_a_difference_that_is_shown_smaller_keeps_its_largest_pixels() -> None:
    image = np.zeros((5, 4, 3), np.uint8)
    image[4, 3] = (9, 0, 3)
    one, other = Image.fromarray(image), Image.new("RGB", (4, 5))
    assert np.asarray(difference_image(other, one)).tolist() == image.tolist()
    small = np.asarray(difference_image(one, other, 3))
    assert small.shape == (3, 2, 3)
    assert small[2, 1].tolist() == [9, 0, 3]
    assert small.sum() == 12


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


EIGHT = (
    "no further from eager fp32 than eager bf16 is, within 1 dB of mean PSNR; further only as its own build accepted "
    "it, and never below 15 dB"
)


def rounding(limit: float) -> Quantized:
    """The record of a build whose engine's prediction is 0.03 from the float one."""
    errors = (StepError(981.0, 0.01), StepError(21.0, 0.03))
    return Quantized(Asked({}), {}, Quality((StepError(981.0, 0.5),), errors, None, limit), {})


@pytest.mark.parametrize(
    ("mean", "accepted", "ok", "found", "further"),
    [
        (41.2, rounding(0.1), True, "as close as bf16: 41.2 dB, bf16 41.8 dB", False),
        (41.2, None, True, "as close as bf16: 41.2 dB, bf16 41.8 dB", False),
        (31.2, rounding(0.1), None, "further: 31.2 dB, bf16 41.8 dB", True),
        (
            31.2,
            rounding(0.02),
            False,
            "further: 31.2 dB, bf16 41.8 dB, and its build did not find it good enough",
            False,
        ),
        (31.2, None, False, "further: 31.2 dB, bf16 41.8 dB, and its build did not find it good enough", False),
        (14.2, rounding(0.1), False, "another image: 14.2 dB, bf16 41.8 dB", False),
    ],
)
def test_an_engine_in_eight_bits_may_be_further_than_half_precision_as_its_build_accepted(
    mean: float, accepted: Quantized | None, ok: bool | None, found: str, further: bool
) -> None:
    judged = judge_engine(engine("int8"), at(mean - 2, mean + 2), at(41.8, 41.8), accepted)
    assert judged == Verdict(ok, EIGHT, found, further)


def test_engines_in_eight_bits_are_measured_by_the_half_precision_of_their_target() -> None:
    bundle = Path("bundle")
    assert Subject("a", "tiny", "openvino-int8", "int8", bundle).judged_in == "bf16"
    assert Subject("a", "tiny", "tensorrt-rtx-fp8", "fp8", bundle).judged_in == "fp16"
    missing = judge_engine(Subject("a", "tiny", "tensorrt-int8", "int8", bundle), at(30.0), None, rounding(0.1))
    assert missing is not None
    assert (missing.ok, missing.found, missing.further) == (None, "no eager fp16 images to compare with", False)


def test_what_cannot_be_judged_is_not_called_right_and_eager_gets_no_verdict() -> None:
    rule = "every image is at least 40 dB PSNR from eager fp32"
    assert judge_engine(engine("fp32"), None, None) == Verdict(None, rule, "no eager images to compare with")
    half = judge_engine(engine("fp16"), at(30.0), None)
    assert half is not None
    assert (half.ok, half.found) == (None, "no eager fp16 images to compare with")
    assert judge_engine(Subject("tiny eager", "tiny"), None, None) is None
