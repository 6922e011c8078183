"""Reference images: eager in float32, eager in half precision, the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdkd.compare.measure.beside import perceptual
from sdkd.compare.measure.calls import Request
from sdkd.compare.measure.cases import Case, LoadedSubjects
from sdkd.compare.measure.quality import Likeness, likeness
from sdkd.compare.measure.subjects import STUDENT, TEACHER, Failed, Subject
from sdkd.core.console import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EagerImages:
    """Eager images of one model in one precision."""

    label: str
    images: Sequence[Image]

    def distance(self, images: Sequence[Image]) -> Likeness:
        """How far images of the same prompts and seeds are from these."""
        return likeness(images, self.images, self.label, perceptual())


@dataclass
class ReferenceImages:
    """All reference images of a comparison, by model and precision; `notes` say which could not be made and why."""

    by_key: dict[tuple[str, str], EagerImages] = field(default_factory=dict)
    teacher_key: str | None = None
    notes: list[str] = field(default_factory=list)

    def own(self, subject: Subject) -> EagerImages | None:
        """Eager float32 images of the subject's own model; None for the subject that is this reference."""
        return None if subject.is_reference else self.by_key.get((subject.model_key, "fp32"))

    def half(self, subject: Subject) -> EagerImages | None:
        """Eager images in the half precision of an engine."""
        if subject.is_eager or subject.precision == "fp32":
            return None
        return self.by_key.get((subject.model_key, subject.precision))

    def teacher(self, subject: Subject) -> EagerImages | None:
        """The teacher's eager float32 images, for a student."""
        if subject.role != STUDENT or self.teacher_key is None:
            return None
        return self.by_key.get((self.teacher_key, "fp32"))


def find_references(
    cases: Sequence[Case], request: Request, loaded: LoadedSubjects, progress: Progress
) -> ReferenceImages:
    """Take the references from the subjects, and make those that are missing (untimed, after all timing).

    One that failed gives its images where it had made them all, and is not tried again.
    """
    teacher = next((case.subject.model_key for case in cases if case.subject.role == TEACHER), None)
    found, failed = ReferenceImages(teacher_key=teacher), set[tuple[str, str]]()
    for case in cases:
        key = case.subject.model_key, case.subject.precision
        if case.subject.is_eager and case.images:
            found.by_key.setdefault(key, EagerImages(case.subject.label, case.images))
        elif case.subject.is_eager:
            failed.add(key)
    missing = [one for one in _missing(cases, found) if (one.model_key, one.precision) not in failed]
    for place, subject in enumerate(missing):
        progress(f"reference images of {subject.label}", place / len(missing))
        try:
            images = _images(Case(subject), loaded, request)
        except Exception as error:  # noqa: BLE001 - the measurement is done, and must not be lost for a reference
            found.notes.append(f"no reference images of {subject.label}: {Failed.of(subject, error).reason}")
            continue
        found.by_key[subject.model_key, subject.precision] = EagerImages(subject.label, images)
    return found


def _images(case: Case, loaded: LoadedSubjects, request: Request) -> list[Image]:
    """All images of a subject, which is unloaded again."""
    try:
        runner = loaded.runner(case)
        calls = [runner.images(request, prompt).images for prompt in range(len(request.prompts))]
    finally:
        loaded.unload(case)
    return [call[place] for place in range(request.batch) for call in calls]


def _missing(cases: Sequence[Case], found: ReferenceImages) -> list[Subject]:
    """Eager subjects that must still be run, each once: float32 of every model, and the half of each half engine."""
    wanted = {}
    for case in cases:
        if case.failed:
            continue
        model = case.subject.model
        for precision in dict.fromkeys(("fp32", case.subject.precision)):
            suffix = "" if precision == "fp32" else f"-{precision}"
            label = f"{case.subject.model_label} eager{suffix}"
            made = Subject(label, model, precision=precision, replaced=case.subject.replaced)
            wanted[made.model_key, precision] = made
    return [subject for key, subject in wanted.items() if key not in found.by_key]
