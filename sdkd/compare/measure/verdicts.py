"""The rules that engine images must keep, and whether they do."""

from __future__ import annotations

from dataclasses import dataclass

from sdkd.compare.measure.quality import Likeness
from sdkd.compare.measure.subjects import Subject

FP32_LEAST_DB = 40.0
HALF_MARGIN_DB = 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether a rule holds (None: could not be judged), the rule, and what was found."""

    ok: bool | None
    rule: str
    found: str


def judge_engine(subject: Subject, against_eager: Likeness | None, eager_half: Likeness | None) -> Verdict | None:
    """The verdict on an engine; None for an eager subject, which is the measure itself.

    `eager_half`: eager in the engine's own half precision against the same float32 images.
    """
    if subject.is_eager:
        return None
    if subject.precision == "fp32":
        return _judge_fp32(against_eager)
    return _judge_half(subject.precision, against_eager, eager_half)


def _judge_fp32(found: Likeness | None) -> Verdict:
    rule = f"every image is at least {FP32_LEAST_DB:.0f} dB PSNR from eager fp32"
    if found is None:
        return Verdict(None, rule, "no eager images to compare with")
    return Verdict(found.psnr_min_db >= FP32_LEAST_DB, rule, f"worst image {_db(found, worst=True)}")


def _judge_half(precision: str, found: Likeness | None, eager: Likeness | None) -> Verdict:
    rule = f"no further from eager fp32 than eager {precision} is, within {HALF_MARGIN_DB:.0f} dB of mean PSNR"
    if found is None or eager is None:
        return Verdict(None, rule, f"no eager {'fp32' if found is None else precision} images to compare with")
    ok = found.psnr_mean_db >= eager.psnr_mean_db - HALF_MARGIN_DB
    return Verdict(ok, rule, f"{_db(found)}, eager {precision} {_db(eager)}")


def _db(found: Likeness, worst: bool = False) -> str:
    return "identical" if found.identical else f"{found.psnr_min_db if worst else found.psnr_mean_db:.1f} dB"
