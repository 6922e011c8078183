"""Options out of bounds are refused before anything is loaded, and pixels that are no numbers are never written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from engines.generate.cli import drawn_size, generate
from engines.generate.drawing import Request, draw
from export.build.options import BuildOptions
from sdkd.core.console import quiet
from sdkd.core.profiles import Range
from sdkd.errors import EngineError, InputError

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": math.nan}, "guidance scale nan is not finite"),
    ({"guidance_scale": math.inf}, "guidance scale inf is not finite"),
    ({"guidance_scale": 1e308}, r"guidance scale 1e\+308 is too large: give a number from 0 to 1000"),
    ({"seed": 2**64}, "seed 18446744073709551616 is too large"),
    ({"seed": -1}, "seed -1 is too small"),
    ({"count": 10**9}, "count 1000000000 is too large"),
    ({"steps": 10**9}, "steps 1000000000 is too large"),
    ({"steps": True}, "steps True is not a number"),
]


def test_the_command_refuses_before_it_looks_at_the_model_and_a_request_likewise() -> None:
    usual = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 7.5, "seed": 0, "count": 1}
    for options, message in OPTIONS:
        with pytest.raises(InputError, match=message):
            generate("no-such-model", "a star", **options)
        with pytest.raises(InputError, match=message):
            Request(("a star",), None, **(usual | options))
    with pytest.raises(InputError, match="seed of the last image 18446744073709551616 is too large"):
        Request(("a star",), None, **(usual | {"seed": 2**64 - 1, "count": 2}))
    for name, value, message in (
        ("batch", 100_000, "batch 100000 is too large"),
        ("control_scale", math.nan, "is not finite"),
        ("image_guidance_scale", math.inf, "is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            generate("no-such-model", "a star", **{name: value})
    for text in ("1000000000", "9" * 5000, "9000000"):
        with pytest.raises(InputError, match=r"is too large|is not understood"):
            drawn_size(text)
        with pytest.raises(InputError, match=r"is too large|is not understood|is not a whole"):
            Range.parse(f"1..{text}0")


def test_options_of_builds_are_numbers() -> None:
    with pytest.raises(InputError, match="workspace-gb nan is no size"):
        BuildOptions(workspace_gb=math.nan)
    with pytest.raises(InputError, match=r"built with options\.refit is 3, not text: build it again"):
        BuildOptions.of({"refit": 3})


def test_pixels_that_are_no_numbers_are_an_error(eager: StableDiffusionPipeline, tmp_path: Path) -> None:
    request = Request(("a star",), None, 32, 32, 2, 7.5, 0, 1)
    assert draw(eager, request, [0], quiet)[0].size == (32, 32)
    with torch.no_grad():
        next(eager.vae.decoder.parameters()).fill_(math.nan)
    with pytest.raises(EngineError, match=r"image 1: pixels are not finite .* nothing was written"):
        draw(eager, request, [0], quiet)
