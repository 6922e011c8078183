"""tools/bench_int8.py: what it makes of a profile and of its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bench_int8
import bench_int8_quality
import benchmarks_page


def event(name: str, kind: str, microseconds: int, part: str = "kernel_time") -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_{part}", "dur": microseconds, "args": {"op_name": kind}}


def test_a_profile_is_the_last_calls_of_every_node_by_operator() -> None:
    call = [event("a", "Conv", 300_000), event("b", "Conv", 100_000), event("c", "Add", 500_000)]
    first = [event("a", "Conv", 9_000_000), event("a", "Conv", 9_000_000, "fence_before"), {"cat": "Session", "dur": 9}]
    found = bench_int8.by_operator([*first, *call, *call], calls=2)
    assert found == [{"operator": "Add", "seconds": 0.5, "nodes": 1}, {"operator": "Conv", "seconds": 0.4, "nodes": 2}]


def test_the_pages_show_calls_builds_profiles_and_what_failed() -> None:
    built = {"what": "build", "model": "demo", "way": "openvino-int8", "build_seconds": 57.64, "bytes": 14_334_774,
             "rounded_layers": 242, "float_layers": 40, "relative_error": 0.0051}  # fmt: skip
    calls = [
        {"what": "call", "model": "demo", "way": "openvino", "seconds": 0.0629, "faster": None},
        {"what": "call", "model": "demo", "way": "openvino-int8", "seconds": 0.0406, "faster": [1.55, 1.5, 1.6]},
    ]
    calls[1]["than_half"] = [1.4, 1.3, 1.5]
    operators = [{"operator": "QLinearConv", "seconds": 0.01434, "nodes": 82}]
    profile = {"what": "profile", "model": "demo", "way": "onnxruntime-int8", "operators": operators}
    found = {
        "machine": "example",
        "date": "2026-01-02",
        "commit": "abc1234",
        "rows": [built, *calls, profile],
        "errors": {"demo tensorrt-rtx-fp8": "BuildError: no"},
    }
    lines = bench_int8.page(found)
    assert "| demo | openvino | 0.063 | – | – |" in lines
    assert "| demo | openvino-int8 | 0.041 | 1.55x (1.50 to 1.60) | 1.40x (1.30 to 1.50) |" in lines
    assert "| demo | openvino-int8 | 57.6 | 14 | 242 | 40 | 0.005 |" in lines
    assert "| QLinearConv | 82 | 0.0143 |" in lines
    assert "- demo tensorrt-rtx-fp8: BuildError: no" in lines
    assert benchmarks_page.eight_bits(found) == [
        ["demo", "openvino", "0.0629 s", "–"],
        ["demo", "openvino-int8", "0.0406 s", "1.55× (1.50–1.60)"],
    ]


def test_the_page_of_quality_shows_images_errors_and_layers() -> None:
    rounding = {
        "quality": {"simulated": [], "engine": [{"timestep": 999.0, "relative": 0.02}]},
        "sensitivity": {f"layer.{number}": 0.01 / number for number in range(1, 9)},
    }
    figures = {"right": 0.985, "psnr_mean_db": 41.04, "psnr_min_db": 38.0, "ssim_mean": 0.997}
    figures |= {"per_image_psnr_db": [14.9, 15.0, 44.0]}
    rows: list[dict[str, Any]] = [
        {"subject": "demo eager", "run": "25 steps", "right": 0.99, "rounding": None, "per_image_psnr_db": None}
        | dict.fromkeys(("psnr_mean_db", "psnr_min_db", "ssim_mean")),
        {"subject": "demo openvino-int8", "run": "25 steps", "rounding": rounding, **figures},
    ]
    lines = list(bench_int8_quality.page({"machine": "it", "date": "today", "commit": "abc", "rows": rows}))
    assert "| demo eager | 25 steps | 99.0% | – | – | – |" in lines
    assert "| demo openvino-int8 | 25 steps | 98.5% | 41.0 | 38.0 | 0.997 |" in lines
    assert "- demo openvino-int8: 1 of 3" in lines
    assert "| 999 | 2.00% | 4.0e-04 |" in lines
    assert "| layer.1 | 10.00% |" in lines
    assert sum("layer." in line for line in lines) == bench_int8_quality.SHOWN_LAYERS
