"""The report as JSON and on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from planted_report import PROMPTS, planted_report

from sdkd.compare.measure.quality import likeness
from sdkd.compare.measure.results import SCHEMA
from sdkd.compare.measure.stats import Spread
from sdkd.compare.report.files import write_report
from sdkd.compare.report.words import noise_note
from sdkd.errors import InputError, OutputExistsError, ParityError


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """The planted report, through JSON and back."""
    return dict(json.loads(json.dumps(planted_report().to_json(), allow_nan=False)))


def row(data: dict[str, Any], label: str) -> dict[str, Any]:
    return next(result for result in data["results"] if result["label"] == label)


def test_the_json_has_units_raw_samples_and_no_infinity(data: dict[str, Any]) -> None:
    assert data["schema"] == SCHEMA
    assert data["setup"]["prompts"] == list(PROMPTS)
    step = row(data, "tiny eager")["unet_step_ms"]
    assert step["count"] == sum(map(len, step["samples"])) == 30
    assert step["p10"] <= step["median"] <= step["p90"]
    assert step["median"] == pytest.approx(13.2, rel=0.05)
    assert step["p99"] is None  # of 30 calls that would be the slowest
    units = {"unet_step_ms", "unet_step_cpu_ms", "image_s", "images_per_s", "load_s", "first_call_s", "bytes_on_disk"}
    assert units <= set(row(data, "tiny eager"))


def test_engine_and_teacher_are_compared_in_fields_of_their_own_and_ratios_name_what_they_are_over(
    data: dict[str, Any],
) -> None:
    engine = row(data, "tiny onnxruntime")
    assert engine["against_eager"]["reference"] == "tiny eager"
    assert engine["against_teacher"]["reference"] == "teacher eager"
    assert engine["against_eager"]["psnr_min_db"] > 50 > 20 > engine["against_teacher"]["psnr_mean_db"]
    assert engine["verdict"] == {"ok": True, "rule": "every image is at least 40 dB PSNR from eager fp32",
                                 "found": engine["verdict"]["found"]}  # fmt: skip
    assert row(data, "teacher onnxruntime")["against_teacher"] is None
    assert row(data, "tiny eager")["against_eager"] is None
    found = row(data, "tiny openvino")["step_speedup"]
    assert {name: ratio["over"] for name, ratio in found.items()} == {"eager": "tiny eager", "teacher": "teacher eager"}
    assert found["eager"]["value"] == pytest.approx(1.9, rel=0.05)
    assert found["teacher"]["low"] <= found["teacher"]["value"] <= found["teacher"]["high"]
    assert found["eager"]["tie"] is False
    assert row(data, "teacher eager")["step_speedup"] == {}


def test_identical_images_are_null_and_say_so() -> None:
    report = planted_report(models=("teacher", "tiny"))
    images = report.images["tiny eager"]
    first = dataclasses.replace(report.results[0], against_eager=likeness(images, images, "tiny eager"))
    same = dataclasses.replace(report, results=(first, *report.results[1:])).to_json()["results"][0]["against_eager"]
    names = ("identical", "psnr_mean_db", "psnr_min_db", "max_abs_levels")
    assert [same[name] for name in names] == [True, None, None, 0]
    assert same["per_image"][0] == {"psnr_db": None, "identical": True, "max_abs": 0, "ssim": 1.0, "lpips": None}


def test_a_wrong_engine_is_called_wrong_with_advice() -> None:
    planted_report().check()
    report = planted_report(wrong="tiny onnxruntime")
    assert [result.subject.label for result in report.broken] == ["tiny onnxruntime"]
    assert (planted_report().ok, report.ok, report.to_json()["ok"]) == (True, False, False)
    with pytest.raises(
        ParityError,
        match=r"1 of 12 subjects broke a rule. 'tiny onnxruntime': worst image .* at least 40 dB.* Export and build "
        r"the engine again, with: sdkd build-engine models/tiny --target onnxruntime --output bundles/tiny --overwrite",
    ):
        report.check()
    with pytest.raises(ParityError, match="Compare more than 3 prompts to be sure, then use the fp32 engine, or"):
        planted_report(wrong="tiny openvino-bf16").check()


def test_a_noisy_machine_is_called_noisy() -> None:
    report = planted_report()
    assert report.noisy == ()
    assert noise_note(report) is None
    loud = Spread.of([[1.0, 2.0], [1.1, 2.1], [1.0, 1.5]])
    results = (dataclasses.replace(report.results[0], unet_step_ms=loud), *report.results[1:])
    noisy = dataclasses.replace(report, results=results)
    assert noisy.noisy == ("teacher eager",)
    assert noisy.to_json()["noisy"] == ["teacher eager"]
    note = noise_note(noisy)
    assert note is not None
    assert note.startswith("The machine was busy: calls of 1 of 12 subjects spread widely")
    assert report.to_json()["busy_before"] is None
    busy = dataclasses.replace(report, environment={**report.environment, "load_average": [1.5, 0.2, 0.1]})
    assert busy.to_json()["busy_before"] == "its load average was 1.5 on 2 cores"
    assert noise_note(busy) == "The machine was not quiet when this began: its load average was 1.5 on 2 cores"


def test_a_result_is_found_by_its_label() -> None:
    report = planted_report()
    assert report.result("small eager").unet_parameters == 2_110_000
    with pytest.raises(InputError, match="the report has no subject 'huge eager': it has teacher eager"):
        report.result("huge eager")


def test_everything_is_written(tmp_path: Path) -> None:
    page = write_report(planted_report(), tmp_path / "out" / "compare")
    folder = tmp_path / "out" / "compare"
    assert page == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == {"images", "report.html", "report.json", "report.md"}
    images = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").iterdir())
    written = json.loads((folder / "report.json").read_text())
    assert images == sorted(name for result in written["results"] for name in result["images"])
    assert Image.open(folder / "images" / "tiny-openvino-bf16-2.png").size == (64, 64)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare"]


def test_files_of_others_stay_and_a_report_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("kept")
    write_report(planted_report(), tmp_path)
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(OutputExistsError, match="already holds images: choose another folder or pass --overwrite"):
        write_report(planted_report(), tmp_path)
    assert (tmp_path / "report.json").read_text() == before
    write_report(planted_report(models=("teacher",)), tmp_path, overwrite=True)
    assert {path.name.split("-")[0] for path in (tmp_path / "images").iterdir()} == {"teacher"}
    assert (tmp_path / "models" / "mine").read_text() == "kept"


def _killed(new: Path, place: Path) -> None:
    raise RuntimeError("killed")


def test_a_kill_between_the_parts_leaves_no_report_that_looks_whole_and_the_next_one_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("kept")
    write_report(planted_report(models=("teacher",)), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sdkd.compare.report.files.put", _killed)
        with pytest.raises(RuntimeError, match="killed"):
            write_report(planted_report(models=("teacher", "tiny")), tmp_path, overwrite=True)
    assert not (tmp_path / "report.json").exists()
    write_report(planted_report(models=("teacher", "tiny")), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "images", "report.md", "report.html", "report.json"}
    assert {path.name.split("-")[0] for path in (tmp_path / "images").iterdir()} == {"teacher", "tiny"}


def test_a_failure_while_writing_leaves_the_old_report(tmp_path: Path) -> None:
    write_report(planted_report(models=("teacher",)), tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir() if path.is_file()}
    whole = planted_report(models=("teacher",))
    broken = dataclasses.replace(whole, environment={**whole.environment, "cpu_mhz": float("nan")})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_report(broken, tmp_path / "report", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
