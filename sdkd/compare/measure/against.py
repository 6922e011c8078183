"""A report held against an earlier one: what became faster or slower, whose images changed, who came and went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdkd.compare.measure.earlier import Earlier, Row, read_report
from sdkd.compare.measure.stats import Ratio, speedup
from sdkd.core.numbers import check_number
from sdkd.errors import InputError, RegressionError, SdkdError

THRESHOLD = 0.1  # a UNet step may take so much longer before it is an error
CHANGED_DB = 1.0  # a mean PSNR that moved by more is said

Speed = Literal["faster", "slower", "tie", "not compared"]
Images = Literal["same", "changed", "worse", "better", "not compared"]


# What two reports must have in common, and for what. A UNet call is as long whatever the prompt, the scheduler and the
# number of steps; likeness does not hang on the machine: an image is measured against eager images of the same machine.
BOTH, SPEED, IMAGES = ("speed", "images"), ("speed",), ("images",)
SETTINGS = (
    ("setup", "size_px", "image side in pixels", BOTH),
    ("setup", "width_px", "image width where it is not square", BOTH),
    ("setup", "batch", "images per call", BOTH),
    ("setup", "seed", "seed", IMAGES),
    ("setup", "prompts", "prompts", IMAGES),
    ("setup", "timing", "clock", SPEED),
    ("environment", "device", "device", SPEED),
    ("environment", "cpu", "CPU", SPEED),
    ("environment", "cores_usable", "usable cores", SPEED),
    ("environment", "threads_torch", "threads of PyTorch", SPEED),
    ("environment", "gpu", "GPU", SPEED),
)
# The same of each subject, since a few-step model is run otherwise than its teacher.
OF_SUBJECT = (
    ("unet_batch", "latents per UNet call", BOTH),
    ("steps", "steps", IMAGES),
    ("scheduler", "scheduler", IMAGES),
    ("guidance_scale", "guidance scale", IMAGES),
)


@dataclass(frozen=True)
class Change:
    """One subject then and now. `speed` is the ratio of medians, then over now: above 1 it became faster."""

    then: Row
    now: Row
    speed: Ratio | None
    images: Images
    psnr_change_db: float | None
    why_not: str = ""  # why the speeds were not compared

    @property
    def label(self) -> str:
        """The subject's label."""
        return self.now.label

    @property
    def verdict(self) -> Speed:
        """`tie` where the interval holds 1."""
        if self.speed is None:
            return "not compared"
        return "tie" if self.speed.tie else "faster" if self.speed.value > 1 else "slower"

    @property
    def slower_by(self) -> float:
        """How much longer a UNet step takes now: 0.2 is 20 % longer; 0 where speeds were not compared."""
        return 0.0 if self.speed is None else 1 / self.speed.value - 1

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        ratio = self.speed
        return {
            "label": self.label,
            "verdict": self.verdict,
            "step_speedup": None if ratio is None else {**vars(ratio), "tie": ratio.tie},
            "then_ms": self.then.step_ms.median,
            "now_ms": self.now.step_ms.median,
            "why_not": self.why_not,
            "images": self.images,
            "psnr_change_db": self.psnr_change_db,
        }


@dataclass(frozen=True)
class Against:
    """A whole report against an earlier one; `differences` and `notes` are in words."""

    report: str
    day: str
    threshold: float
    changes: tuple[Change, ...]
    appeared: tuple[str, ...]
    went: tuple[str, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """Subjects that are slower by more than the threshold, or whose images became wrong."""
        return tuple(change for change in self.changes if self.is_slower(change) or change.images == "worse")

    def is_slower(self, change: Change) -> bool:
        """Whether a subject is slower by more than the threshold, with an interval that excludes 1."""
        return change.verdict == "slower" and change.slower_by > self.threshold

    def problem(self) -> SdkdError | None:
        """The error to end with: RegressionError names what is worse, InputError says why no speed was compared."""
        if self.worse:
            first, count = self.worse[0], len(self.worse)
            return RegressionError(
                f"{count} of {len(self.changes)} subjects {'is' if count == 1 else 'are'} worse than in "
                f"{self.report!r} of {self.day}. {first.label!r}: {' and '.join(self._complaints(first))}. "
                "Find the cause; where the change is wanted, compare against the new report from now on"
            )
        if all(change.speed is None for change in self.changes):
            why = "; ".join(dict.fromkeys(change.why_not for change in self.changes)) or "all that it has failed now"
            return InputError(
                f"no speed can be compared with {self.report!r}: {why}. Measure both on one machine with equal settings"
            )
        return None

    def _complaints(self, change: Change) -> list[str]:
        found = []
        if self.is_slower(change) and (ratio := change.speed) is not None:
            found.append(
                f"a UNet step takes {change.slower_by:.0%} longer ({change.then.step_ms.median:.4g} ms then, "
                f"{change.now.step_ms.median:.4g} ms now; speed {ratio.value:.2f}, {ratio.confidence:.0%} interval "
                f"{ratio.low:.2f}–{ratio.high:.2f}), and {self.threshold:.0%} is allowed"
            )
        if change.images == "worse":
            found.append(f"its images broke their rule, which they did not then ({change.now.found})")
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; see docs/compare.md."""
        problem = self.problem()
        lists = {name: list(getattr(self, name)) for name in ("appeared", "went", "differences", "notes")}
        return {
            **{name: getattr(self, name) for name in ("report", "day", "threshold")},
            "ok": problem is None,
            "problem": None if problem is None else str(problem),
            "subjects": [change.to_json() for change in self.changes],
            **lists,
        }


def check_common(then: Earlier, labels: list[str]) -> None:
    """InputError when no subject of the earlier report is among `labels`."""
    if not set(then.rows) & set(labels):
        raise InputError(
            f"report {then.name!r} has no subject of this comparison: it has {', '.join(then.rows)}, this one "
            f"{', '.join(labels)}. Compare the same models and targets"
        )


def weigh(then: Earlier, now: Earlier, threshold: float = THRESHOLD) -> Against:
    """What changed between two reports, subject by subject; `threshold` 0.1 lets a step take 10 % longer."""
    differ = {
        text: hangs
        for part, key, words, hangs in SETTINGS
        if (text := _difference(words, *(getattr(report, part).get(key) for report in (then, now))))
    }
    speed = "; ".join(text for text, hangs in differ.items() if "speed" in hangs)
    images = any("images" in hangs for hangs in differ.values())
    both = [label for label in now.rows if label in then.rows]
    own = {label: _other_run(then.rows[label], now.rows[label]) for label in both}
    return Against(
        report=then.name,
        day=str(then.environment["date_utc"])[:10],  # UTC
        threshold=threshold,
        changes=tuple(_change(then.rows[label], now.rows[label], speed, images, own[label]) for label in both),
        appeared=tuple(label for label in now.rows if label not in then.rows),
        went=tuple(label for label in then.rows if label not in now.rows),
        differences=(*differ, *_by_subject(own)),
        notes=tuple(_notes(then, now, both)),
    )


def _difference(setting: str, then: Any, now: Any) -> str | None:
    """In words how two reports differ in a setting; None where they do not."""
    old, new = (value.get("gpu") if isinstance(value, Mapping) else value for value in (then, now))
    if old == new:
        return None
    if isinstance(old, list) and isinstance(new, list):
        return f"{setting}: {len(old)} then, {len(new)} now, not the same"
    return f"{setting}: {'none' if old is None else old} then, {'none' if new is None else new} now"


def _other_run(then: Row, now: Row) -> dict[str, tuple[str, ...]]:
    """In words how a subject is run otherwise, and what hangs on each."""
    found = {_difference(words, then.run.get(key), now.run.get(key)): hangs for key, words, hangs in OF_SUBJECT}
    return {text: hangs for text, hangs in found.items() if text}


def _by_subject(differ: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Each difference once: of all subjects, or of those that it names."""
    texts = dict.fromkeys(text for found in differ.values() for text in found)
    names = {text: [label for label, found in differ.items() if text in found] for text in texts}
    return [text if len(names[text]) == len(differ) else f"{text} ({', '.join(names[text])})" for text in texts]


def _change(then: Row, now: Row, differ: str, other_images: bool, own: Mapping[str, tuple[str, ...]]) -> Change:
    of_speed = "; ".join(text for text, hangs in own.items() if "speed" in hangs)
    other_images = other_images or any("images" in hangs for hangs in own.values())
    why = differ or of_speed or _other_model(then, now)
    # The two were not measured in turns: rounds of one have nothing to do with rounds of the other.
    ratio = None if why else speedup(then.step_ms.samples, now.step_ms.samples, paired=False)
    if not why and ratio is None:
        why = "fewer than three rounds were timed"
    change = None if then.psnr_db is None or now.psnr_db is None else now.psnr_db - then.psnr_db
    found: Images = "not compared" if other_images or _other_model(then, now) else _images(then, now, change)
    return Change(then, now, ratio, found, None if found == "not compared" else change, why)


def _other_model(then: Row, now: Row) -> str:
    """In words why the subjects of one label are not the same, or nothing."""
    if then.unet_parameters != now.unet_parameters:
        return f"another model: {then.unet_parameters:,} UNet parameters then, {now.unet_parameters:,} now"
    if then.precision != now.precision:
        return f"another precision: {then.precision} then, {now.precision} now"
    return ""


def _images(then: Row, now: Row, change: float | None) -> Images:
    if then.ok is not False and now.ok is False:
        return "worse"
    if then.ok is False and now.ok:
        return "better"
    if change is None:  # eager fp32 is the measure itself
        return "not compared"
    return "changed" if abs(change) > CHANGED_DB else "same"


def _notes(then: Earlier, now: Earlier, labels: list[str]) -> list[str]:
    """What a reader should know and no verdict hangs on: other versions, another place of the model."""
    old, new = (report.environment.get("versions", {}) for report in (then, now))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    found = [f"{name} {old.get(name, 'not there')} then, {new.get(name, 'not there')} now" for name in names]
    models = dict.fromkeys((then.rows[label].model, now.rows[label].model) for label in labels)
    places = {True: "every subject in a process of its own", False: "all in one process"}
    if then.setup["isolated"] != now.setup["isolated"]:
        found.append(f"{places[then.setup['isolated']]} then, {places[now.setup['isolated']]} now")
    return found + [f"model {before!r} then, {after!r} now" for before, after in models if before != after]


def compare_files(then: Path, now: Path, threshold: float = THRESHOLD) -> Against:
    """Compare two report.json files; InputError as `read_report` and `check_common`, and for a threshold below 0."""
    check_number("threshold", threshold, 0)
    earlier, later = read_report(then), read_report(now)
    check_common(earlier, list(later.rows))
    return weigh(earlier, later, threshold)
