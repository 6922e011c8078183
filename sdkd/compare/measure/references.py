"""The eager images that likeness is measured to: taken from the subjects, or made after all timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdkd.compare.measure.calls import Asked
from sdkd.compare.measure.cases import Case, LoadedSubjects, in_order
from sdkd.compare.measure.quality import Likeness, likeness
from sdkd.compare.measure.scores import lpips_here
from sdkd.compare.measure.subjects import EAGER, STUDENT, TEACHER, Subject
from sdkd.core.console import Progress
from sdkd.models.generation import Generation

if TYPE_CHECKING:
    from PIL.Image import Image

Key = tuple[str, str, Generation | None, int]
"""What eager images depend on: model, precision, steps, guidance scale and scheduler, and the cache interval."""


def _key(subject: Subject, precision: str | None = None, interval: int = 1) -> Key:
    return subject.model_key, precision or subject.precision, subject.run, interval


@dataclass
class ReferenceImages:
    """Eager images by what they depend on, with their label; `notes` say which could not be made and why."""

    by_key: dict[Key, tuple[str, Sequence[Image]]] = field(default_factory=dict)
    teacher: Subject | None = None
    notes: list[str] = field(default_factory=list)

    def to_own(self, subject: Subject, images: Sequence[Image]) -> Likeness | None:
        """How far images are from eager float32 of the subject's own model, every step computed; None for that subject
        itself.
        """
        return None if subject.is_reference else self._distance(_key(subject, "fp32"), images)

    def to_own_cached(self, subject: Subject, images: Sequence[Image]) -> Likeness | None:
        """The same, of eager float32 that caches steps as the subject does: what its engines are judged by."""
        return self._distance(_key(subject, "fp32", subject.cache_interval), images)

    def half_to_own(self, subject: Subject) -> Likeness | None:
        """How far eager images in the half precision of an engine, of eight bits in that which it is judged in, are
        from eager float32, both cached as it is.
        """
        half = self.by_key.get(_key(subject, subject.judged_in, subject.cache_interval))
        if half is None or subject.is_eager or subject.precision == "fp32":
            return None
        return self._distance(_key(subject, "fp32", subject.cache_interval), half[1])

    def to_teacher(self, subject: Subject, images: Sequence[Image]) -> Likeness | None:
        """How far a student's images are from the teacher's eager float32 ones, each drawn as it is run."""
        if subject.role != STUDENT or self.teacher is None:
            return None
        return self._distance(_key(self.teacher, "fp32"), images)

    def _distance(self, key: Key, images: Sequence[Image]) -> Likeness | None:
        if (found := self.by_key.get(key)) is None:
            return None
        return likeness(images, found[1], found[0], lpips_here())


def find_references(cases: Sequence[Case], asked: Asked, loaded: LoadedSubjects, progress: Progress) -> ReferenceImages:
    """Take the references from the subjects, and make those that are missing (untimed, after all timing).

    One that failed gives its images where it had made them all, and is not tried again.
    """
    teacher = next((case.subject for case in cases if case.subject.role == TEACHER), None)
    found, tried = ReferenceImages(teacher=teacher), set[Key]()
    for case in (case for case in cases if case.subject.is_eager):
        key = _key(case.subject, None, case.subject.cache_interval)
        tried.add(key)
        if case.images:
            found.by_key.setdefault(key, (case.subject.label, case.images))
    missing = {key: subject for key, subject in _references(cases).items() if key not in tried}
    loaded.config = replace(loaded.config, untimed=True)
    for place, (key, subject) in enumerate(missing.items()):
        progress(f"reference images of {subject.label}", place / len(missing))
        case = Case(subject)
        with loaded.trying(case):  # the measurement is done, and must not be lost for a reference
            runner = loaded.runner(case)
            calls = [runner.images(case.request(asked), prompt) for prompt in range(len(asked.prompts))]
            loaded.unload(case)
            found.by_key[key] = subject.label, in_order(calls)
        if case.failed:
            found.notes.append(f"no reference images of {subject.label}: {case.failed.reason}")
    return found


def _references(cases: Sequence[Case]) -> dict[Key, Subject]:
    """The eager subjects that cases are held against, each run as they are: float32, and the half that an engine is
    judged in; for one that caches steps every step computed, and cached as it is.
    """
    wanted = {}
    for subject in (case.subject for case in cases if not case.failed):
        own = subject.cache_interval
        for precision, interval in dict.fromkeys((("fp32", 1), ("fp32", own), (subject.judged_in, own))):
            made = replace(subject, label="-", target=EAGER, precision=precision, bundle=None, cache_interval=interval)
            wanted[_key(made, None, interval)] = replace(made, label=f"{subject.model_label} {made.runs_as}")
    return wanted
