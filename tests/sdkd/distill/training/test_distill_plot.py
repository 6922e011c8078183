"""The page of a run: every quantity once, every picture, nothing from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sdkd.distill.training.plot import charts, samples, write_page
from sdkd.errors import InputError

RECORDS = [
    {
        "step": 10 * step,
        "loss/total": 4.0 / step,
        "loss/task": 1.0 / step,
        "loss/output": 1.0 / step,
        "loss/feature": 2.0 / step,
        "loss/feature/up_blocks.0": 2.0 / step,
        "lr": 1e-4,
        "images_per_second": 3.25,
        "data_wait": 0.01,
        "memory_gb": 1.5,
        "seconds": 30.0 * step,
    }
    for step in range(1, 5)
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my <run>"
    (folder / "samples").mkdir(parents=True)
    (folder / "training.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    for step in (20, 100):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"step-{step:06d}.png")
    (folder / "samples" / "prompts.json").write_text(json.dumps({"prompts": ["a <b>cat</b>"], "seed": 0}))
    return folder


def test_page_holds_every_quantity_and_picture(run: Path) -> None:
    text = write_page(run).read_text()
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>", text)
    assert titles == [
        *("Losses", "Feature KD of each pair", "Learning rate", "Images per second"),
        *("Share of the time spent waiting for data", "Peak memory, GB", "Step 20", "Step 100"),
    ]
    assert "40 optimizer steps in 2.0 minutes" in text
    assert "4 → 1" in text
    assert "my &lt;run&gt;" in text
    assert "a &lt;b&gt;cat&lt;/b&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_curves_are_the_records() -> None:
    found = dict(charts(RECORDS))
    assert b"up_blocks.0" not in found["Losses"]
    assert charts(RECORDS[:1])[0][0] == "Losses"
    without = [{key: value for key, value in record.items() if "feature" not in key} for record in RECORDS]
    assert "Feature KD of each pair" not in dict(charts(without))


def test_pictures_come_in_order_and_a_cut_log_is_read_to_its_last_whole_line(run: Path) -> None:
    assert [step for step, _ in samples(run)] == [20, 100]
    with (run / "training.jsonl").open("a") as stream:
        stream.write('{"step": 50, "loss/to')
    assert "40 optimizer steps" in write_page(run, run / "other.html").read_text()


def test_a_folder_without_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no training\.jsonl with records"):
        write_page(tmp_path)
