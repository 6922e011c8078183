"""`sdkd generate --prompts`: batches, going on, several real processes, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from generate_runs import app, pixels, run
from PIL import Image
from processes import finished, interrupted
from small_bundles import small_pipeline

from engines import load_pipeline
from engines.generate.drawing import Request, engine_batch, in_batches
from engines.generate.image_inputs import Inputs
from engines.generate.processes import check_gpus
from engines.generate.prompts import METADATA
from export.build.engines import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import InputError, OutputExistsError

TEXTS = ("a red star", "a blue ring", "a cat", "a lighthouse", "snow")


def numbers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.png"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of five prompts."""
    file = tmp_path / "list.txt"
    file.write_text("\n".join(TEXTS))
    return file


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five images, each drawn in a call of its own, two steps, nothing blue."""
    home = tmp_path_factory.mktemp("alone")
    (home / "list.txt").write_text("\n".join(TEXTS))
    words = ("--prompts", home / "list.txt", "-o", home / "out", "--steps", 2, "--negative-prompt", "blue")
    result = run(folder, *words)
    assert result.exit_code == 0, result.exception
    assert "image 1 of 5" in result.output
    return home / "out"


def same_images(first: Path, second: Path, tolerance: int = 1) -> None:
    """Equal but for how sums are ordered in a batch of another size."""
    assert numbers(first) == numbers(second) == [f"{index:05d}.png" for index in range(5)]
    for name in numbers(first):
        assert np.abs(pixels(first / name) - pixels(second / name)).max() <= tolerance


def test_a_batch_draws_what_single_calls_draw(folder: Path, prompts: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--prompts", prompts, "-o", out, "--steps", 2, "--negative-prompt", "blue", "--batch", 3)
    result = run(folder, *words)
    assert result.exit_code == 0, result.exception
    assert "images 1 to 3 of 5" in result.output
    same_images(out, alone)
    for name in numbers(out):
        assert Image.open(out / name).text == Image.open(alone / name).text
    assert Image.open(out / "00004.png").text["seed"] == "4"
    assert Image.open(out / "00004.png").text["prompt"] == "snow"


def test_engines_draw_as_many_as_they_were_built_for(
    engine_bundle: Path, prompts: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--prompts", prompts, "--target", "onnxruntime", "-o")
    result = run(engine_bundle, *words, out, "--steps", 2, "--negative-prompt", "blue")
    assert result.exit_code == 0, result.exception
    assert "images 1 to 2 of 5" in result.output
    same_images(out, alone)
    result = run(engine_bundle, *words, tmp_path / "free", "--steps", 1, "--guidance-scale", 1)
    assert result.exit_code == 0, result.exception
    assert "images 1 to 4 of 5" in result.output


def test_the_batch_of_a_size(engine_bundle: Path) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")

    def asked(size: int, guidance: float, **scales: float) -> Range:
        request = Request(TEXTS, None, size, size, 2, guidance, 0, 5, inputs=Inputs(scales=scales))
        return engine_batch(pipe, request.settings)

    assert asked(64, 7.5) == Range(1, 1, 2)
    assert asked(64, 1.0) == Range(1, 1, 4)
    assert asked(64, 7.5, image_guidance_scale=0.5) == Range(1, 1, 4)
    assert asked(128, 7.5) == Range.fixed(1)
    assert engine_batch(small_pipeline(), Request(TEXTS, None, 32, 32, 2, 7.5, 0, 5).settings) == Range.fixed(1)
    assert in_batches([0, 2, 3, 7, 9], 2) == [[0, 2], [3, 7], [9]]


def test_the_last_batch_is_filled_up_for_an_engine_of_one_batch(
    bundle_copy: Path, prompts: Path, alone: Path, tmp_path: Path
) -> None:
    pair = ShapeRanges(Range.fixed(2), Range.fixed(32), Range.fixed(32), Range.fixed(77))
    build_engine(Bundle.open(bundle_copy), "onnxruntime", ranges=pair, components=("unet", "vae_decoder"))
    words = ("--prompts", prompts, "-o", tmp_path / "out", "--steps", 2, "--negative-prompt", "blue")
    result = run(bundle_copy, *words, "--target", "onnxruntime")
    assert result.exit_code == 0, result.exception
    same_images(tmp_path / "out", alone)


def test_going_on_draws_what_is_missing(folder: Path, prompts: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--prompts", prompts, "-o", out, "--steps", 2, "--negative-prompt", "blue", "--batch", 2)
    assert run(folder, *words).exit_code == 0
    before = {name: (out / name).stat().st_mtime_ns for name in numbers(out)}
    for name in ("00001.png", "00003.png", "00004.png"):
        (out / name).unlink()
    again = run(folder, *words)
    assert "images 2 to 4 of 5" in again.output
    assert "for 3 images, 2 were there" in again.output.replace("\n", " ")
    assert [(out / name).stat().st_mtime_ns == before[name] for name in numbers(out)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    same_images(out, alone)
    assert rows(out) == [{"file_name": f"{index:05d}.png", "text": TEXTS[index]} for index in range(5)]
    with pytest.raises(OutputExistsError, match=r"00000\.png' is there and was drawn from other settings"):
        raise run(folder, *words, "--strength", 1, "--image", out / "00000.png").exception


def rows(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / METADATA).read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_draw_what_is_missing_and_what_one_draws(
    folder: Path, prompts: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("00000.png", "00003.png"):
        shutil.copy(alone / name, out)
    before = {name: (out / name).stat().st_mtime_ns for name in numbers(out)}
    words = (folder, "--prompts", prompts, "-o", out, "--steps", 2, "--negative-prompt", "blue", "--batch", 2)
    log = tmp_path / "log"
    status = finished(["generate", *words, "--num-processes", 2], log, OMP_NUM_THREADS="1")  # as in this process
    assert status == 0, log.read_text()
    assert log.read_text().replace("\n", " ").count("for 3 images, 2 were there") == 1
    same_images(out, alone)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert rows(out) == [{"file_name": f"{index:05d}.png", "text": TEXTS[index]} for index in range(5)]
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_one_process_that_fails_ends_the_command(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "00003.png" / "in the way").mkdir(parents=True)  # the second process cannot write its last image
    words = (folder, "--prompts", prompts, "--steps", 1, "--batch", 2, "-o", out, "--num-processes=2")
    log = tmp_path / "log"
    assert finished(["generate", *words, "--overwrite"], log) == 1
    said = " ".join(log.read_text().split())
    assert "00003.png" in said, said
    assert "and a file is wanted" in said, said
    assert "sdkd: one of 2 processes ended with status 1: its message is above" in said
    there = [name for name in numbers(out) if (out / name).is_file()]
    assert "00002.png" in there
    assert [row["file_name"] for row in rows(out)] == there
    assert not list(out.glob(".*"))


def test_ctrl_c_keeps_finished_images_of_one_process(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out, main = tmp_path / "out", threading.main_thread().ident
    assert main
    ended = threading.Event()

    def press() -> None:
        while not ended.wait(0.02):
            if len(numbers(out)) >= 3:
                signal.pthread_kill(main, signal.SIGINT)
                return

    thread = threading.Thread(target=press)
    thread.start()
    words = [str(folder), "--prompts", str(prompts), "--steps", "5", "--count", "1000", "-o", str(out)]
    try:
        assert app(words, standalone_mode=False) == 130
    finally:
        ended.set()
        thread.join()
    there = numbers(out)
    assert len(there) >= 3
    assert [row["file_name"] for row in rows(out)] == there
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_ctrl_c_keeps_finished_images_of_two_processes(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    words = ("generate", folder, "--prompts", prompts, "--steps", 5, "--count", 1000, "-o", out, "--num-processes", 2)
    status = interrupted(words, log, lambda: len(numbers(out)) >= 3, seconds=120)
    assert status == 130, log.read_text()
    wait_until_quiet(out)
    found = [row["file_name"] for row in rows(out)]
    there = numbers(out)
    assert len(there) >= 3
    assert not list(out.glob(".*"))
    assert found == [name for name in there if name in found]
    assert len(there) - len(found) <= 1  # another process may have written one in the meantime


def wait_until_quiet(out: Path) -> None:
    """A launcher's processes end a moment after it."""
    before, end = None, time.monotonic() + 30
    while time.monotonic() < end and before != (before := {file.name for file in out.iterdir()}):
        time.sleep(1.5)


def test_processes_share_a_file_of_prompts_and_have_a_gpu_each(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 processes share a file of prompts: give --prompts FILE"):
        raise run(folder, "x", "--num-processes", 2).exception
    end, begin = os.pipe()
    os.write(begin, b"x")
    os.close(begin)
    with pytest.raises(InputError, match=r"2 processes share a file of prompts: give --prompts FILE"):
        raise run(folder, "--prompts", f"/dev/fd/{end}", "-o", tmp_path, "--num-processes", 2).exception
    os.close(end)
    with pytest.raises(InputError, match=r"1000 processes need 1000 GPUs for target tensorrt, and this machine has"):
        check_gpus("tensorrt", 1000)
    check_gpus("openvino", 1000)
    check_gpus("eager", 1000)
