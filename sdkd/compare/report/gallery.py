"""The images of a comparison for its page: shots with their references and differences, and the worst of each kind."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdkd.compare.measure.quality import Likeness, difference_image
from sdkd.compare.measure.results import Report, Result
from sdkd.compare.report.columns import similarity

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["eager", "teacher"]
KINDS: Mapping[Kind, str] = {"eager": "own eager", "teacher": "the teacher"}
LARGEST_EMBEDDED_PX = 320  # larger images are shown smaller on the page; the originals are beside it
PIXELATED_PX = 160  # up to this side an image is enlarged with square pixels
GAINS = (8, 64)  # how much brighter differences can be shown
WHITE = 255


@dataclass(frozen=True)
class Shot:
    """One image of the gallery: its data URI, its key, the keys of its references, its likeness to them (or "")."""

    key: str
    source: str
    alt: str
    label: str
    references: Mapping[Kind, str]
    captions: Mapping[Kind, str]


@dataclass(frozen=True)
class Worst:
    """The image of one kind that is furthest from its reference, its difference, and by how much that is amplified."""

    title: str
    label: str
    reference: str
    prompt: str
    shown: tuple[str, str, str]  # data URIs: the image, its reference, their difference
    gain: int
    figures: str


def data_uri(image: Image) -> str:
    """A PNG data URI, at most LARGEST_EMBEDDED_PX on a side."""
    shown = image.copy()
    if max(shown.size) > LARGEST_EMBEDDED_PX:
        shown.thumbnail((LARGEST_EMBEDDED_PX, LARGEST_EMBEDDED_PX))
    stream = io.BytesIO()
    shown.save(stream, "PNG", optimize=max(shown.size) <= PIXELATED_PX)  # minutes for many large ones
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def found_likeness(row: Result, kind: Kind) -> Likeness | None:
    """The likeness to own eager, or to the teacher."""
    return row.against_eager if kind == "eager" else row.against_teacher


def reference(report: Report, row: Result, kind: Kind) -> Result | None:
    """The subject whose images are the reference, None where there is none or it is not among the subjects."""
    found = found_likeness(row, kind)
    return next((other for other in report.results if found and other.subject.label == found.reference), None)


def kinds(report: Report) -> dict[Kind, str]:
    """The kinds of reference that any image has on the page, and what each is called."""
    shown = {kind for kind in KINDS for row in report.results if reference(report, row, kind) is not None}
    return {kind: name for kind, name in KINDS.items() if kind in shown}


def gallery(report: Report) -> list[tuple[str, list[Shot]]]:
    """The prompt of every image, with one shot per subject."""
    return [
        (prompt, [_shot(report, row, number, prompt) for row in report.results])
        for number, prompt in enumerate(report.setup.image_prompts)
    ]


def _shot(report: Report, row: Result, number: int, prompt: str) -> Shot:
    others = {kind: reference(report, row, kind) for kind in KINDS}
    likenesses = {kind: found_likeness(row, kind) for kind in KINDS}
    return Shot(
        key=_key(row, number),
        source=data_uri(report.images[row.subject.label][number]),
        alt=f"{row.subject.label}: {prompt}",
        label=row.subject.label,
        references={kind: "" if other is None else _key(other, number) for kind, other in others.items()},
        captions={kind: "" if found is None else _decibels(found, number) for kind, found in likenesses.items()},
    )


def _key(row: Result, number: int) -> str:
    return f"{row.subject.slug}-{number}"


def _decibels(found: Likeness, number: int) -> str:
    value = found.per_image[number].psnr_db
    return "identical" if value is None else f"{value:.1f} dB"


def differences(report: Report) -> dict[str, dict[Kind, str]]:
    """By shot and kind of reference, the difference as a data URI; not amplified, the page does that."""
    found: dict[str, dict[Kind, str]] = {}
    for row in report.results:
        others = {kind: other for kind in KINDS if (other := reference(report, row, kind)) is not None}
        for number in range(len(report.setup.image_prompts) if others else 0):
            made = {kind: _difference(report, row, other, number) for kind, other in others.items()}
            found[_key(row, number)] = made
    return found


def _difference(report: Report, row: Result, other: Result, number: int) -> str:
    own, base = (report.images[one.subject.label][number] for one in (row, other))
    return data_uri(difference_image(own, base, LARGEST_EMBEDDED_PX))


def worst_images(report: Report) -> list[Worst]:
    """The engine image furthest from own eager, and the student image furthest from the teacher, where it is shown."""
    worst = []
    for kind, name in KINDS.items():
        pairs = [(found, row, reference(report, row, kind)) for row in report.results
                 if (found := found_likeness(row, kind)) and not found.identical]  # fmt: skip
        shown = [(found, row, other) for found, row, other in pairs if other is not None]
        if shown:
            worst.append(_worst(report, f"Furthest from {name}", *min(shown, key=lambda item: item[0].psnr_min_db)))
    return worst


def _worst(report: Report, title: str, found: Likeness, row: Result, other: Result) -> Worst:
    number, image = found.worst, found.per_image[found.worst]
    lpips = "" if image.lpips is None else f", LPIPS {image.lpips:.3f}"
    pair = [data_uri(report.images[one.subject.label][number]) for one in (row, other)]
    return Worst(
        title=title,
        label=row.subject.label,
        reference=other.subject.label,
        prompt=report.setup.image_prompts[number],
        shown=(pair[0], pair[1], _difference(report, row, other, number)),
        gain=gain_for(image.max_abs),
        figures=f"{_decibels(found, number)} PSNR, SSIM {similarity(image.ssim)}{lpips}, "
        f"largest difference {image.max_abs} of {WHITE} levels",
    )


def gain_for(max_abs: int) -> int:
    """The largest power of two that does not push a difference of so many grey levels beyond white."""
    return 1 << max(0, (WHITE // max(max_abs, 1)).bit_length() - 1)
