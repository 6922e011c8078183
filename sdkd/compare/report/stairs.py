"""The staircase of a comparison: what each change brings to an image, as a table and as inline SVG."""

from __future__ import annotations

from html import escape

from sdkd.compare.measure.results import Report, Stair
from sdkd.compare.measure.stats import Gain
from sdkd.compare.report.charts import CHARACTER_PX
from sdkd.compare.report.columns import EMPTY, MB, MILLION, Cell, Tone, number, similarity

# Title, unit, and the heading of two lines on a terminal; the last one only where captions were judged.
HEADS = (
    ("Change", "", ""),
    ("An image", "s", "image\ns"),
    ("Over the row above", "", "over\nabove"),
    ("Over the first", "", "over\nfirst"),
    ("VAE", "of the time", "VAE\nshare"),
    ("Peak memory", "MB", "peak\nMB"),
    ("Pipeline", "M params", "params\nM"),
    ("To the first", "dB PSNR (SSIM)", "PSNR\ndB"),
    ("Captions", "right", "caption\nright"),
)
_ROW, _BAR, _GAP = 46, 16, 8  # pixels
_VALUE = 132  # at the right of the longest bar


def heads(report: Report) -> tuple[tuple[str, str, str], ...]:
    """The headings that have a value in any row."""
    return HEADS if any(stair.judged is not None for stair in report.stairs) else HEADS[:-1]


def cells(report: Report, stair: Stair) -> tuple[Cell, ...]:
    """One cell for each of `heads`."""
    close = stair.to_first
    psnr = "identical" if close and close.identical else number(close.psnr_mean_db) if close else ""
    found = (
        Cell(stair.change),
        Cell(number(stair.image_s)),
        _gain(stair.over_previous),
        _gain(stair.over_first),
        Cell(f"{stair.vae_share:.0%}"),
        EMPTY if stair.peak_bytes is None else Cell(number(stair.peak_bytes / MB)),
        Cell(number(stair.parameters / MILLION)),
        Cell(psnr, similarity(close.ssim_mean)) if close else EMPTY,
        EMPTY if stair.judged is None else Cell(f"{stair.judged:.0%}"),
    )
    return found[: len(heads(report))]


def _gain(gain: Gain | None) -> Cell:
    if gain is None:
        return EMPTY
    note = "" if gain.low is None or gain.high is None else f"{gain.low:.2f}–{gain.high:.2f}"
    if gain.tie:
        return Cell("tie", note, tone="muted")
    tone: Tone = "good" if gain.value > 1 else "bad"
    return Cell(f"{gain.value:.2f}×", note, tone=tone)


def title(report: Report) -> str:
    """The staircase in one line: from what to what, and how much faster an image is."""
    first, last = report.stairs[0], report.stairs[-1]
    if last.over_first is None:
        return f"An image in {number(first.image_s)} s"
    times = "" if last.over_first.tie else f", {last.over_first.value:.1f}× as fast"
    return f"An image in {number(first.image_s)} s, then in {number(last.image_s)} s{times}"


def remarks(report: Report) -> list[str]:
    """What a reader of the table should know."""
    few = [stair.label for stair in report.stairs if stair.over_first and stair.over_first.low is None]
    lost = [label for label in report.setup.staircase if label not in {stair.label for stair in report.stairs}]
    found = ["Each row has one change more than the row above; seconds are medians of whole images, end to end"]
    found += ["Fewer than three images of a subject were timed, so that factors have no interval"] if few else []
    return found + ([f"Not measured, so that the row below has its change, too: {', '.join(lost)}"] if lost else [])


def drawing(report: Report, width: int) -> str:
    """An SVG: a bar of seconds for each row, the VAE's share of it apart, and the factor over the first."""
    longest = max(stair.image_s for stair in report.stairs)
    height = _ROW * len(report.stairs) + _GAP
    spoken = "; ".join(f"{stair.change}: {number(stair.image_s)} seconds" for stair in report.stairs)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title(report))}. {escape(spoken)}">']
    for place, stair in enumerate(report.stairs):
        top = place * _ROW
        long = max(2.0, (width - _VALUE) * stair.image_s / longest)
        vae = long * min(1.0, stair.vae_share)
        over = stair.over_first
        factor = "" if over is None else " (tie)" if over.tie else f" ({over.value:.1f}×)"
        words = stair.change if place == 0 else f"+ {stair.change}"
        bar = f'y="{top + 22}" height="{_BAR}"'
        fit = f' textLength="{width}" lengthAdjust="spacingAndGlyphs"' if CHARACTER_PX * len(words) > width else ""
        parts.append(f'<text class="name" x="0" y="{top + 15}"{fit}>{escape(words)}</text>')
        parts.append(f'<rect class="stair" x="0" {bar} width="{long - vae:.1f}"/>')
        parts.append(f'<rect class="stair vae" x="{long - vae:.1f}" {bar} width="{vae:.1f}"/>')
        text = f"{number(stair.image_s)} s{factor}"
        parts.append(f'<text class="tick" x="{long + 8:.1f}" y="{top + 34}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])
