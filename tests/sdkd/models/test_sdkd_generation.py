"""How a model is to be run: where it is noted, what configs tell, what is said of other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import LCMScheduler
from helpers import tiny_pipeline, tiny_unet

from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.core.files import write_json
from sdkd.errors import InputError, ModelError
from sdkd.families import SDXL, STABLE_DIFFUSION
from sdkd.models.diffusers_folder import PROVENANCE, write_pipeline
from sdkd.models.generation import (
    EMBEDDED_FEW_STEPS,
    FEW_STEPS,
    USUAL,
    Generation,
    entry,
    implied,
    named,
    parse_generation,
    said,
    warnings,
)
from sdkd.models.resolve import resolve
from sdkd.models.schedulers import scheduler_like

TWO_STEPS = Generation(2, 1.0, "TCDScheduler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose sdkd.json says two steps of TCD."""
    path = tmp_path_factory.mktemp("models") / "few"
    write_pipeline(tiny_pipeline(), path, about={"teacher": "demo", **entry(TWO_STEPS)})
    return path


def test_every_kind_of_model_says_it(folder: Path, tmp_path: Path) -> None:
    assert resolve(folder).generation == TWO_STEPS
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "unet", checkpoint / "unet")
    write_json(checkpoint / "checkpoint.json", {})
    write_json(checkpoint / PROVENANCE, {"base": str(folder)})
    assert resolve(checkpoint).generation is None  # of other weights than its base's
    write_json(checkpoint / PROVENANCE, {"base": str(folder), **entry(FEW_STEPS)})
    assert resolve(checkpoint).generation == FEW_STEPS
    Bundle(tmp_path, Manifest(source={"model": "x/y", **entry(FEW_STEPS)}, versions={})).save()
    assert resolve(tmp_path).generation == FEW_STEPS
    assert [resolve(name).generation for name in ("demo", "random:sd15-tiny")] == [None, None]


def test_a_folder_without_a_note_is_told_by_its_configs(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler_like(pipe.scheduler, LCMScheduler)
    write_pipeline(pipe, tmp_path / "lcm")
    write_pipeline(pipe, tmp_path / "embedded", unet=tiny_unet(time_cond_proj_dim=16))
    assert resolve(tmp_path / "lcm").generation == FEW_STEPS
    assert resolve(tmp_path / "embedded").generation == EMBEDDED_FEW_STEPS
    assert implied({}, "DDIMScheduler", "LatentConsistencyModelPipeline") == EMBEDDED_FEW_STEPS
    assert implied({"time_cond_proj_dim": None}, "TCDScheduler") == Generation(4, 1.0, "TCDScheduler")


def test_published_names_tell_the_steps() -> None:
    found = {
        name: named(SDXL, name) for name in ("stabilityai/sdxl-turbo", "sd_xl_turbo_1.0_fp16.safetensors", "a/base")
    }
    assert list(found.values()) == [Generation(1, 1.0), Generation(1, 1.0), None]
    assert named(SDXL, "my/sdxl_lightning_8step_unet") == Generation(8, 1.0)
    assert named(STABLE_DIFFUSION, "stabilityai/sd-turbo") == Generation(1, 1.0)
    assert named(STABLE_DIFFUSION, "turbo/sd15") is None


@pytest.mark.parametrize(
    ("note", "error", "message"),
    [
        ({"steps": 0, "guidance_scale": 1, "scheduler": None}, ModelError, "steps 0 is too small: .*: make it again"),
        ({"steps": "4", "guidance_scale": 1}, InputError, r"generation\.steps is '4', not a whole number"),
        ({"steps": 4}, InputError, r"generation\.guidance_scale is missing"),
    ],
)
def test_a_damaged_note_is_named(
    folder: Path, tmp_path: Path, note: dict[str, Any], error: type[Exception], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / PROVENANCE).write_text(json.dumps({"generation": note}))
    with pytest.raises(error, match=message):
        _ = resolve(tmp_path / "copy").generation


def test_as_a_user_writes_it() -> None:
    assert parse_generation("steps=1, guidance=0,scheduler=euler") == Generation(1, 0.0, "EulerDiscreteScheduler")
    for text, message in (
        ("steps=4", "give all three of steps=4,guidance=1,scheduler=lcm"),
        ("steps=four,guidance=1,scheduler=lcm", "has a number that is none"),
        ("steps=4,guidance=nan,scheduler=lcm", "guidance nan is not finite"),
        ("steps=0,guidance=1,scheduler=lcm", "steps 0 is too small"),
        ("steps=4,guidance=1,scheduler=magic", "scheduler 'magic' is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            parse_generation(text)


def test_what_is_said() -> None:
    assert said(None, USUAL) is None
    assert said(FEW_STEPS, FEW_STEPS) == "4 steps, guidance 1, LCMScheduler: as the model was made for"
    other = FEW_STEPS.with_asked(1, None, None)
    assert said(FEW_STEPS, other) == (
        "1 step, guidance 1, LCMScheduler; the model was made for 4 steps, guidance 1, LCMScheduler"
    )


def test_poor_settings_are_warned_of_once_each() -> None:
    found = warnings(FEW_STEPS, FEW_STEPS.with_asked(25, 7.5, "ddim"), negative="blue")
    assert [line.split(" on a model")[0] for line in found] == ["25 steps", "guidance 7.5", "DDIMScheduler"]
    assert found[1].endswith("and above 2 its images are oversaturated")
    mild = warnings(FEW_STEPS, FEW_STEPS.with_asked(8, 1.5, "tcd"), negative="blue")
    assert mild == [
        "guidance 1.5 on a model that has its guidance built in (made for 1): every step computes twice as much"
    ]
    assert warnings(FEW_STEPS, FEW_STEPS, negative="blue") == [
        "the negative prompt has no effect at guidance 1: give a guidance scale above 1, or leave it out"
    ]
    assert warnings(EMBEDDED_FEW_STEPS, EMBEDDED_FEW_STEPS.with_asked(None, 15.0, None), embedded=True) == []
    assert warnings(None, USUAL, negative="blue") == warnings(FEW_STEPS, FEW_STEPS) == []
