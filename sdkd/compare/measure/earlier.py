"""A report on disk, of this version or an earlier one: what of it a later report is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from sdkd.compare.measure.quality import IDENTICAL_DB
from sdkd.compare.measure.stats import Spread
from sdkd.core.documents import parse_json, read_regular
from sdkd.core.schema import problem
from sdkd.errors import InputError

# Schemas: 1 had one image per call and no comparison with an earlier report, 2 no memory at its peak, no times of text
# encoder and VAE, all subjects in one process, no limits and no SSIM, 3 one number of steps, guidance scale and
# scheduler for all, in `setup`.
READABLE = (1, 2, 3, 4)
RUN = ("unet_batch", "steps", "scheduler", "guidance_scale")  # of a subject
EARLIER = "give the report.json of an earlier comparison"


@dataclass(frozen=True)
class Row:
    """One subject of a report on disk: raw samples of its UNet step, and what was found about its images."""

    label: str
    model: str
    precision: str
    unet_parameters: int
    step_ms: Spread
    run: Mapping[str, Any]  # by RUN; None for what the file does not say
    psnr_db: float | None  # mean, to eager fp32 of its own model; None where it was not compared
    ok: bool | None  # whether its rule held; None where nothing was judged
    found: str  # what the rule was judged by


@dataclass(frozen=True)
class Earlier:
    """A report on disk: where it came from, what was asked on what machine, and its subjects by label."""

    name: str
    setup: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Mapping[str, Row]


class _RowJson(TypedDict):
    label: str
    model: str
    precision: str
    unet_parameters: int
    unet_step_ms: dict[str, Any]
    against_eager: dict[str, Any] | None
    verdict: dict[str, Any] | None


class _EnvironmentJson(TypedDict):
    date_utc: str


class _ReportJson(TypedDict):
    schema: int
    setup: dict[str, Any]
    environment: _EnvironmentJson
    results: list[_RowJson]


def read_report(path: Path) -> Earlier:
    """The report.json at `path`; InputError when it is missing, no report of `sdkd compare`, or of another schema."""
    try:
        path.stat()
        data = parse_json(read_regular(path), strict=True)
    except InputError as error:
        raise InputError(f"{error}; {EARLIER}") from error
    except OSError as error:
        raise InputError(f"report {str(path)!r} cannot be read ({error.strerror}): {EARLIER}") from error
    except ValueError as error:
        raise InputError(f"report {str(path)!r} {error}: {EARLIER}") from error
    return parse_report(data, str(path))


def parse_report(data: Any, name: str) -> Earlier:
    """A report from its JSON; `name` is for messages. InputError as `read_report`."""
    if not isinstance(data, dict) or not {"schema", "setup", "environment", "results"} <= data.keys():
        raise InputError(f"report {name!r} is not one of `sdkd compare`: {EARLIER}")
    if data["schema"] not in READABLE:
        raise InputError(
            f"report {name!r} has schema {data['schema']!r}, this sdkd reads {', '.join(map(str, READABLE))}: "
            "measure again with this version, or compare with the version that wrote it"
        )
    try:
        if wrong := problem(data, _ReportJson):
            raise ValueError(wrong)
        rows = [_row(row, data["setup"]) for row in data["results"]]
        setup = {"batch": 1, "isolated": False, "width_px": None, **data["setup"]}
        return Earlier(name, setup, data["environment"], {row.label: row for row in rows})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"report {name!r} is damaged ({error!r}): make it again with its `command`") from error


def _row(data: Mapping[str, Any], setup: Mapping[str, Any]) -> Row:
    likeness, verdict = data["against_eager"], data["verdict"]
    everything = {**setup, **data, **(data.get("run") or {})}  # before schema 4, `setup` says it for all
    mean = None if likeness is None else IDENTICAL_DB if likeness["identical"] else float(likeness["psnr_mean_db"])
    return Row(
        **{name: data[name] for name in ("label", "model", "precision", "unet_parameters")},
        step_ms=Spread.of(data["unet_step_ms"]["samples"]),
        run={name: everything.get(name) for name in RUN},
        psnr_db=mean,
        ok=None if verdict is None else verdict["ok"],
        found="" if verdict is None else verdict["found"],
    )
