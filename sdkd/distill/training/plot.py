"""A run's loss curves and validation images as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from sdkd.core.documents import read_regular
from sdkd.core.files import check_file_free, read_json, write_bytes
from sdkd.core.marks import is_plot
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.samples import FOLDER
from sdkd.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, float]
PAGE = "plot.html"
COLOURS = ("#4b6188", "#0d8b77", "#c8611b", "#8756a6", "#96801a", "#b4405f", "#5b8c3a", "#2c7fb8", "#7a7a7a")
_SAMPLE = re.compile(r"step-(\d+)\.png")
# Title -> (names of the record, logarithmic axis, unit)
_LOSSES = ("loss/total", "loss/task", "loss/output", "loss/feature")
_OTHERS: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "Learning rate": (("lr",), False, ""),
    "Gradient norm, before clipping": (("grad_norm",), True, ""),
    "Images per second": (("images_per_second",), False, ""),
    "Share of the time spent waiting for data": (("data_wait",), False, ""),
    "Peak memory, GB": (("memory_gb",), False, ""),
}


class _Prompts(TypedDict):
    prompts: list[str]


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Draw a run folder's page (default: plot.html in it) and return where it is; InputError when there is no log.

    An earlier page is drawn again; OutputExistsError when another file is there.
    """
    records = read_log(folder / LOG)
    if not records:
        raise InputError(
            f"folder {str(folder)!r} holds no {LOG} with records: give the output folder of a training run"
        )
    path = output or folder / PAGE
    check_file_free(path, True, () if path.name == PAGE else (folder,), ours=is_plot)
    write_bytes(path, page(folder.resolve().name, records, samples(folder), prompts(folder)).encode())
    return path


def page(name: str, records: Sequence[Record], pictures: Sequence[tuple[int, bytes]], said: Sequence[str]) -> str:
    """The page's HTML: `pictures` are (step, PNG) and `said` their prompts, in the order of the picture's cells."""
    from jinja2 import Environment

    last = records[-1]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files(__package__) / "plot.html").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        steps=int(last["step"]),
        minutes=last["seconds"] / 60,
        facts=_facts(records),
        charts=[(title, _uri(svg, "svg+xml")) for title, svg in charts(records)],
        pictures=[(step, _uri(png, "png")) for step, png in pictures],
        prompts=said,
    )


def charts(records: Sequence[Record]) -> list[tuple[str, bytes]]:
    """(title, SVG) of every quantity that the records hold."""
    pairs = tuple(name for name in records[0] if name.startswith("loss/feature/"))
    wanted: dict[str, tuple[tuple[str, ...], bool, str]] = {
        "Losses": (_LOSSES, True, "loss/"),
        "Feature KD of each pair": (pairs, True, "loss/feature/"),
        **_OTHERS,
    }
    found = []
    for title, (names, logarithmic, prefix) in wanted.items():
        series = {name.removeprefix(prefix): _points(records, name) for name in names}
        if series := {name: points for name, points in series.items() if points[0]}:
            found.append((title, _svg(_figure(series, logarithmic))))
    return found


def _points(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    kept = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in kept], [value for _, value in kept]


def _figure(series: Mapping[str, tuple[list[float], list[float]]], logarithmic: bool) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, (steps, values)), colour in zip(series.items(), COLOURS, strict=False):
        axes.plot(steps, values, color=colour, label=name, linewidth=1.6, marker="o" if len(steps) == 1 else None)
    if logarithmic and min(min(values) for _, values in series.values()) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        figure.legend(loc="outside upper center", frameon=False, fontsize="small", ncols=4)
    return figure


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    first, last = records[0], records[-1]
    losses = [
        (name.removeprefix("loss/") + " loss", f"{first[name]:.4g} → {last[name]:.4g}")
        for name in _LOSSES
        if name in last
    ]
    return [*losses, ("images per second", f"{last['images_per_second']:.3g}")]


def samples(folder: Path) -> list[tuple[int, bytes]]:
    """(step, PNG) of a run's validation images, in order."""
    found = []
    for path in sorted((folder / FOLDER).glob("step-*.png")):
        if match := _SAMPLE.fullmatch(path.name):
            found.append((int(match[1]), read_regular(path)))
    return found


def prompts(folder: Path) -> list[str]:
    """The validation prompts of a run; empty when there are none."""
    path = folder / FOLDER / "prompts.json"
    return list(read_json(path, _Prompts, strict=True)["prompts"]) if path.exists() else []


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
