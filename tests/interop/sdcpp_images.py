"""stable-diffusion.cpp beside eager PyTorch, with our packages on PYTHONPATH: writes REPORT.

Full-size weights, since it knows no other shapes; small images of few steps. The scheduler is one whose noise diffusers
scales as stable-diffusion.cpp does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler

from sdkd.compare import Subject
from sdkd.compare.measure.calls import Request, make_images
from sdkd.compare.measure.quality import image_likeness
from sdkd.compare.measure.runner import LocalRunner, RunConfig
from sdkd.compare.measure.subjects import close_subject, count_parameters, open_subject
from sdkd.models.generation import Generation
from sdkd.models.schedulers import scheduler_like

MODEL, STEPS = "random:sd15-tiny", 3
REQUEST = Request(("a lighthouse in a storm",), 5, 64, 2, run=Generation(STEPS, 7.5))


def images(target: str) -> tuple[Any, dict[str, Any]]:
    """The two images of a target, and its parameters and what it left behind."""
    subject = Subject("-", MODEL, target)
    pipe = open_subject(subject)
    pipe.scheduler = scheduler_like(pipe.scheduler, EulerDiscreteScheduler, timestep_spacing="trailing")
    made, counts = make_images(pipe, REQUEST, 0), count_parameters(subject, pipe)
    folder = getattr(pipe, "folder", None)
    files = [] if folder is None else [file.name for file in folder.iterdir()]
    close_subject(subject, pipe)
    return made, {"parameters": counts, "files": files, "gone": folder is None or not folder.exists()}


def samples(target: str) -> dict[str, list[float]]:
    """Seconds of each part, as a comparison asks for them."""
    runner = LocalRunner(Subject("-", MODEL, target, run=REQUEST.run), RunConfig("cpu", size=REQUEST.size))
    runner.open()
    parts = {"unet": 2, "text_encoder": 1, "vae_decoder": 1}
    found = {part: [one.wall_s for one in runner.burst(REQUEST, part, count, 0.0)] for part, count in parts.items()}
    again = runner.burst(REQUEST, "vae_decoder", 1, 0.0)
    runner.close()
    return {**found, "again": [one.wall_s for one in again]}


def main(output: str) -> None:
    """Draw with both and keep what was found."""
    torch.set_num_threads(2)
    eager, of_eager = images("eager")
    other, of_other = images("stable-diffusion-cpp")
    near = [image_likeness(*pair).psnr_db for pair in zip(other, eager, strict=True)]
    apart = image_likeness(eager[0], eager[1]).psnr_db
    report = {
        "psnr_db": near, "apart_db": apart, "eager": of_eager, "other": of_other,
        "seconds": samples("stable-diffusion-cpp"),
    }  # fmt: skip
    Path(output).write_text(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
