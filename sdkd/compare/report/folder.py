"""A report's folder: report.json, report.md, report.html and images/, alone or beside files of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdkd.compare.measure.results import Report, image_name
from sdkd.core.files import staged_folder, write_bytes, write_json
from sdkd.core.interrupts import between_steps
from sdkd.core.marks import COMPARISON
from sdkd.core.outputs import Input, check_parts_free, is_replaceable
from sdkd.core.replace import put, sweep_inside, temporary, temporary_folder

PARTS = ("images", "report.md", "report.html", "report.json")  # the JSON last: it is there only when all is


def check_report_free(folder: Path, overwrite: bool, inputs: Sequence[Input] = ()) -> None:
    """As `sdkd.core.outputs.check_free`, for the parts of a report; other files in `folder` do not matter."""
    check_parts_free(folder, COMPARISON, PARTS, overwrite, inputs)


def write_report(report: Report, folder: str | Path, overwrite: bool = False) -> Path:
    """Write report.json, report.md, report.html and images/ into `folder`; gives the path of the HTML page.

    Everything is made in a temporary folder first. A folder with nothing else in it is replaced in one step. Files of
    others in `folder` stay, and the parts are moved in among them: after a kill in between there is no report.json,
    never an old one beside new parts. Raises OutputExistsError.
    """
    folder = Path(folder)
    check_report_free(folder, overwrite)
    if is_replaceable(folder) and not _others(folder):
        with staged_folder(folder) as staged:
            _write_parts(report, staged)
        return folder / "report.html"
    with temporary_folder(folder) as staged:
        _write_parts(report, staged)
        whole = temporary(folder / PARTS[-1], "partial")  # after a kill, the proof that the other parts are sdkd's
        with between_steps() as check:
            (staged / PARTS[-1]).replace(whole)
            (folder / PARTS[-1]).unlink(missing_ok=True)
            for part in PARTS[:-1]:
                (put if (staged / part).is_dir() else Path.replace)(staged / part, folder / part)
            whole.replace(folder / PARTS[-1])
            check()
    sweep_inside(folder)
    return folder / "report.html"


def _others(folder: Path) -> bool:
    """Whether a folder holds anything beside a report."""
    return folder.exists() and any(path.name not in PARTS for path in folder.iterdir())


def _write_parts(report: Report, folder: Path) -> None:
    from sdkd.compare.report.page import html_page
    from sdkd.compare.report.tables import markdown

    (folder / "images").mkdir()
    for row in report.results:
        for number, image in enumerate(report.images[row.subject.label]):
            image.save(folder / image_name(row.subject, number))
    write_bytes(folder / "report.md", markdown(report).encode())
    write_bytes(folder / "report.html", html_page(report).encode())
    write_json(folder / "report.json", report.to_json())
