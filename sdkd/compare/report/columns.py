"""The columns of a comparison, declared once; the terminal table, the Markdown table and the page all use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sdkd.compare.measure.quality import Likeness
from sdkd.compare.measure.results import Report, Result
from sdkd.compare.measure.stats import Ratio

MB = 1e6
MILLION = 1e6
GIGA = 1e9
STYLES = {"good": "green", "bad": "bold red", "muted": "dim", "": ""}  # of a terminal, by tone
Tone = Literal["", "good", "bad", "muted"]


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, a smaller remark, the value it sorts by, and whether it is good news."""

    text: str
    note: str = ""
    sort: float | str | None = None
    tone: Tone = ""

    @property
    def inline(self) -> str:
        """The text with its remark in parentheses."""
        return f"{self.text} ({self.note})" if self.note else self.text


EMPTY = Cell("–", tone="muted")


def number(value: float) -> str:
    """About three significant digits, without an exponent: 1,234; 123; 12.3; 1.23; 0.123; 0.012."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.2g}"


@dataclass(frozen=True)
class Column:
    """One column: title, unit, what it means, and how a result becomes a cell (EMPTY where it has no value)."""

    key: str
    title: str
    unit: str
    help: str
    cell: Callable[[Result], Cell]
    better: Literal["", "low", "high"] = ""
    page_only: bool = False
    parts: bool = False  # shown in a table of its own, with the parts of an image
    mixed: bool = False  # shown where subjects were drawn with different steps or guidance scales
    varies: bool = False  # shown where it is not the same of all


def _spread(row: Result) -> Cell:
    step = row.unet_step_ms
    return Cell(number(step.median), f"{number(step.p10)}–{number(step.p90)}", step.median)


def _ratio(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return EMPTY
    interval = f"{ratio.low:.2f}–{ratio.high:.2f}"
    if ratio.tie:
        return Cell("tie", interval, ratio.value, "muted")
    return Cell(f"{ratio.value:.2f}×", interval, ratio.value, "good" if ratio.value > 1 else "bad")


def _against_eager(row: Result) -> Cell:
    found = row.against_eager
    if found is None:
        return EMPTY
    if found.identical:
        return Cell("identical", "", found.psnr_mean_db)
    return Cell(f"{found.psnr_mean_db:.1f}", f"worst {found.psnr_min_db:.1f}", found.psnr_mean_db)


# By verdict, and by whether the engine is measured against eager in its own half precision.
_VERDICTS: dict[tuple[bool | None, bool], tuple[str, Tone, float]] = {
    (True, False): ("✓ same images", "good", 2),
    (True, True): ("✓ as close as eager ", "good", 2),
    (False, False): ("✗ differs", "bad", 0),
    (False, True): ("✗ further than eager ", "bad", 0),
    (None, False): ("not judged", "muted", 1),
    (None, True): ("not judged, no eager ", "muted", 1),
}


def _verdict(row: Result) -> Cell:
    if row.verdict is None:
        return EMPTY
    note = "" if row.verdict.ok else row.verdict.found.removeprefix("further: ")
    if row.verdict.further:
        return Cell(f"further than eager {row.subject.judged_in}", note, 1, "muted")
    half = "" if row.subject.precision == "fp32" else row.subject.judged_in
    text, tone, sort = _VERDICTS[row.verdict.ok, bool(half)]
    return Cell(text + half, note, sort, tone)


def _teacher(row: Result) -> Cell:
    found = row.against_teacher
    return EMPTY if found is None else Cell(f"{found.psnr_mean_db:.1f}", "", found.psnr_mean_db)


def _ssim(found: Likeness | None) -> Cell:
    if found is None:
        return EMPTY
    if found.identical:
        return Cell("identical", "", 1.0)
    return Cell(similarity(found.ssim_mean), f"worst {similarity(found.ssim_min)}", found.ssim_mean)


def similarity(value: float) -> str:
    """SSIM with three decimals, never rounded up to the 1 that only equal images have."""
    text = f"{value:.3f}"
    return text if value == 1 or float(text) < 1 else "> 0.999"


def _lpips(found: Likeness | None) -> Cell:
    if found is None or found.lpips_mean is None:
        return EMPTY
    return Cell(f"{found.lpips_mean:.3f}", f"worst {found.lpips_max:.3f}", found.lpips_mean)


def _limit(row: Result) -> Cell:
    if row.limit is None:
        return EMPTY
    return Cell(f"{row.limit.fraction:.0%}", f"{number(row.limit.flops_per_s / GIGA)} GFLOP/s", row.limit.fraction)


def memory_bytes(row: Result) -> int:
    """The memory that drawings show: the peak on the GPU, else in RAM, else how much a shared process had grown."""
    peaks = (row.memory.peak_gpu, row.memory.peak_rss, row.memory.growth)
    return next(peak for peak in peaks if peak is not None)


def _judged(row: Result) -> Cell:
    if not row.judged:
        return EMPTY
    mean, (name, worst) = row.judged_mean or 0.0, min(row.judged.items(), key=lambda item: item[1])
    return Cell(f"{mean:.0%}", f"{name} {worst:.0%}" if worst < mean else "", mean)


def _plain(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(number(value), "", value)


def _bytes(count: int | None) -> Cell:
    return _plain(None if count is None else count / MB)


COLUMNS: tuple[Column, ...] = (
    Column("steps", "Steps", "", "Denoising steps of an image.",
           lambda row: Cell(str(row.run.steps), "", row.run.steps), varies=True),
    Column("guidance", "Guidance", "", "Guidance scale; with 1 and below, a step has one latent per image instead of "
           "two.", lambda row: Cell(f"{row.run.guidance_scale:g}", "", row.run.guidance_scale), varies=True),
    Column("scheduler", "Scheduler", "", "What makes the steps of an image.",
           lambda row: Cell(str(row.run.scheduler)), page_only=True, varies=True),
    Column("step", "UNet step", "ms", "Median of one UNet call; p10–p90 below it.", _spread, "low"),
    Column("p99", "p99", "ms", "99 of 100 UNet calls are no longer; only with 100 calls or more.",
           lambda row: _plain(row.unet_step_ms.p99), "low"),
    Column("cpu", "CPU time", "ms", "Median of one UNet call, summed over all threads.",
           lambda row: _plain(row.unet_step_cpu_ms.median), "low"),
    Column("eager", "vs own eager", "", "Speed of a UNet step over eager PyTorch of the same model, and its "
           "interval. A tie: the interval holds 1.", lambda row: _ratio(row.step_speedup.get("eager")), "high"),
    Column("teacher", "vs teacher", "", "Speed of a UNet step over the teacher in eager PyTorch.",
           lambda row: _ratio(row.step_speedup.get("teacher")), "high"),
    Column("baseline", "vs baseline", "", "Speed of a UNet step over the chosen baseline.",
           lambda row: _ratio(row.step_speedup.get("baseline")), "high"),
    Column("image-eager", "Image vs own eager", "", "Speed of a whole image over eager PyTorch of the same model "
           "with the same steps.", lambda row: _ratio(row.image_speedup.get("eager")), "high", mixed=True),
    Column("image-teacher", "Image vs teacher", "", "Speed of a whole image over the teacher in eager PyTorch, each "
           "with its own steps.", lambda row: _ratio(row.image_speedup.get("teacher")), "high", mixed=True),
    Column("images", "Images", "per s", "End to end: text encoder, all steps, scheduler and VAE.",
           lambda row: _plain(row.images_per_s), "high"),
    Column("limit", "Of limit", "", "The least time of a UNet step over its measured time: its arithmetic at "
           "the rate of a matrix product or convolution, or its traffic at that of a copy, measured in the same run.",
           _limit, "high"),
    Column("psnr", "To own eager", "dB PSNR", "Images against eager fp32 of the same model, prompt and noise: mean "
           "over prompts, and the worst.", _against_eager, "high"),
    Column("verdict", "Verdict", "", "Whether the engine keeps the rule below.", _verdict),
    Column("agreement", "To teacher", "dB PSNR", "A student's images against the teacher's of the same prompt and "
           "noise. A student is another model: this is likeness, not an error.", _teacher, "high"),
    Column("clip", "CLIP score", "", "100 times the cosine of an image's and its prompt's CLIP embeddings, mean.",
           lambda row: _plain(row.clip_mean), "high"),
    Column("judged", "Captions", "right", "Attributes that a reader finds in the image as the caption says.",
           _judged, "high"),
    Column("unet", "UNet", "M params", "Parameters of the UNet.",
           lambda row: _plain(row.unet_parameters / MILLION), "low"),
    Column("disk", "On disk", "MB", "Weight files (eager) or engine files.",
           lambda row: _bytes(row.bytes_on_disk), "low"),
    Column("ssim", "To own eager", "SSIM", "Structural similarity to the same images; 1 is equal.",
           lambda row: _ssim(row.against_eager), "high", page_only=True),
    Column("lpips", "To own eager", "LPIPS", "Perceptual distance from the same images; 0 is equal.",
           lambda row: _lpips(row.against_eager), "low", page_only=True),
    Column("agreement-ssim", "To teacher", "SSIM", "Structural similarity of a student's images to the teacher's.",
           lambda row: _ssim(row.against_teacher), "high", page_only=True),
    Column("agreement-lpips", "To teacher", "LPIPS", "Perceptual distance of a student's images from the teacher's.",
           lambda row: _lpips(row.against_teacher), "low", page_only=True),
    Column("whole", "Pipeline", "M params", "Parameters of text encoder, UNet and VAE.",
           lambda row: _plain(row.parameters / MILLION), "low", page_only=True),
    Column("load", "Load", "s", "Opening the pipeline, libraries already imported.",
           lambda row: _plain(row.load_s), "low", page_only=True),
    Column("first", "First image", "s", "The first whole image after loading, compilation included.",
           lambda row: _plain(row.first_call_s), "low", page_only=True),
    Column("text", "Text encoder", "ms", "Median: the prompts of one call to embeddings, tokenizer included.",
           lambda row: _plain(row.text_encoder_ms.median), "low", parts=True),
    Column("calls", "UNet calls", "× step", "UNet calls of one call of the pipeline; a scheduler may make more than "
           "steps.", lambda row: _plain(row.unet_calls or None), parts=True),
    Column("vae", "VAE", "ms", "Median: the latents of one call to pixels.",
           lambda row: _plain(row.vae_decode_ms.median), "low", parts=True),
    Column("rest", "Rest", "ms", "What a whole call takes beside those: loop, scheduler, pixels to images; from "
           "medians, so that noise can make it negative.", lambda row: _plain(row.rest_ms), "low", parts=True),
    Column("memory", "Peak RAM", "+MB", "Growth of the case's process from its start, libraries imported, to its peak.",
           lambda row: _bytes(row.memory.peak_rss), "low", parts=True),
    Column("gpu", "Peak GPU", "MB", "The case's process on the GPU at its peak, context included (NVML).",
           lambda row: _bytes(row.memory.peak_gpu), "low", parts=True),
    Column("torch", "PyTorch on GPU", "MB", "PyTorch's tensors on the GPU at their peak.",
           lambda row: _bytes(row.memory.peak_torch), "low", parts=True),
)  # fmt: skip


def shown_columns(report: Report, page: bool = False, parts: bool = False) -> list[Column]:
    """The columns in which any subject has a value: of the main table, of the parts', or all for the page."""
    kept = [column for column in COLUMNS if page or (column.parts == parts and not column.page_only)]
    return [column for column in kept if _is_shown(column, report)]


def _is_shown(column: Column, report: Report) -> bool:
    cells = {column.cell(row) for row in report.results}
    return cells != {EMPTY} and (report.mixed or not column.mixed) and (len(cells) > 1 or not column.varies)


def best_rows(column: Column, rows: Sequence[Result]) -> set[str]:
    """Labels of the rows that hold a column's best value; none where all are equal or there is nothing to win."""
    values = {row.subject.label: cell.sort for row in rows if isinstance((cell := column.cell(row)).sort, float | int)}
    if not column.better or len(set(values.values())) < 2:
        return set()
    best = (min if column.better == "low" else max)(values.values(), key=float)
    return {label for label, value in values.items() if value == best}


def full_title(column: Column) -> str:
    """Title and unit."""
    return f"{column.title}, {column.unit}" if column.unit else column.title
