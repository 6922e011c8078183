"""The page of a run: every quantity once, every picture, nothing from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sdkd.distill.training.plot import charts, write_page
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


def test_page_holds_every_quantity_and_picture_of_a_log_cut_at_its_end(tmp_path: Path) -> None:
    run = tmp_path / "my <run>"
    (run / "samples").mkdir(parents=True)
    (run / "training.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS) + '{"step": 50, "loss/to')
    for step in (20, 100):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")
    (run / "samples" / "prompts.json").write_text(json.dumps({"prompts": ["a <b>cat</b>"], "seed": 0}))
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


def test_charts_are_of_what_the_log_holds(tmp_path: Path) -> None:
    alone = {key: RECORDS[0][key] for key in ("step", "loss/total", "loss/feature/up_blocks.0", "seconds")}
    found = dict(charts([alone]))
    assert [*found] == ["Losses", "Feature KD of each pair"]
    assert b"up_blocks.0" not in found["Losses"]
    del alone["loss/feature/up_blocks.0"]
    assert [title for title, _ in charts([alone])] == ["Losses"]
    with pytest.raises(InputError, match=r"holds no training\.jsonl with records"):
        write_page(tmp_path)
