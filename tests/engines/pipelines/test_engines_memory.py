"""Memory: engines of which one stage is open, and refusals before anything is opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_exports
import torch
from diffusers import StableDiffusionPipeline
from drawn import differ, draw

import engines.sessions.low_memory as low_memory
from engines import load_pipeline, plug, swap_weights
from engines.sessions.low_memory import StagedSession, check_memory, needed
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import run_memory
from sdkd.errors import EngineError

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def opened(pipe: Any) -> set[str]:
    sessions = [session for name in ("text_encoder", "unet", "vae") for session in getattr(pipe, name).sessions()]
    return {session.checked.record.component for session in sessions if session._session is not None}


def test_engines_take_turns_and_draw_the_same_images(engine_bundle: Path) -> None:
    pipe = load_pipeline(engine_bundle, "openvino", low_memory=True)
    assert opened(pipe) == set()
    seen: list[set[str]] = []

    def look(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(opened(pipe))
        return tensors

    found = draw(pipe, callback_on_step_end=look)
    assert seen == [{"unet"}, {"unet"}]
    assert opened(pipe) == {"vae_decoder"}
    assert np.array_equal(found, draw(load_pipeline(engine_bundle, "openvino")))


def test_weights_outlive_a_stage(engine_bundle: Path) -> None:
    state = {name: tensor * 1.1 for name, tensor in small_exports.small_pipeline().unet.state_dict().items()}
    pipe, whole = (load_pipeline(engine_bundle, "onnxruntime", low_memory=one) for one in (True, False))
    plain = draw(pipe)
    for one in (pipe, whole):
        swap_weights(one, state)
    changed = draw(pipe)
    differ(changed, plain)
    assert np.array_equal(changed, draw(whole))
    assert np.array_equal(draw(pipe), changed)  # the UNet was closed in between
    swap_weights(pipe, None)
    assert np.array_equal(draw(pipe), plain)


def test_a_turn_session_is_checked_at_once_and_closed_for_good(
    bundle_copy: Path, eager: StableDiffusionPipeline
) -> None:
    plug(eager, bundle_copy, "onnxruntime", low_memory=True)
    session = eager.unet.session
    assert isinstance(session, StagedSession)
    with session:
        eager.unet(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 77, 32))
    with pytest.raises(EngineError, match=r"the onnxruntime engine of unet in .* is closed: open it again"):
        session.run({})
    bundle = Bundle.open(bundle_copy)
    path = bundle.path / bundle.engine("onnxruntime", "unet").files[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError.__mro__[1], match=r"unet"):
        load_pipeline(bundle_copy, "onnxruntime", low_memory=True)


def test_the_need_is_all_weights_and_the_largest_workspace(engine_bundle: Path) -> None:
    bundle = Bundle.open(engine_bundle)
    records = [bundle.engine("onnxruntime", name) for name in COMPONENTS]
    weights = sum(record.total_bytes for record in records)
    spaces = [run_memory(bundle, record) - record.total_bytes for record in records]
    assert needed(bundle, "onnxruntime", COMPONENTS, "max") == weights + max(spaces)
    assert needed(bundle, "onnxruntime", COMPONENTS, "min") < weights + max(spaces)


def test_short_memory_is_said_before_anything_is_opened(
    engine_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(engine_bundle)
    least, most = (needed(bundle, "onnxruntime", COMPONENTS, name) for name in ("min", "max"))
    in_turn = max(needed(bundle, "onnxruntime", group, "min") for group in (("unet",), COMPONENTS[2:]))
    assert in_turn < least < most
    monkeypatch.setattr(low_memory, "free_memory", lambda: least - 1)
    with pytest.raises(
        EngineError,
        match=r"the onnxruntime engines of '.*' need about [\d.]+ MB of memory, and [\d.]+ MB are free: "
        r"pass low_memory=True, which opens them in turn",
    ):
        load_pipeline(engine_bundle, "onnxruntime")
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="engines"):
        check_memory(bundle, "onnxruntime", COMPONENTS, "cpu", low_memory=True)
    monkeypatch.setattr(low_memory, "free_memory", lambda: in_turn - 1)
    with pytest.raises(EngineError, match=r"are free: close other programs$"):
        load_pipeline(engine_bundle, "onnxruntime", low_memory=True)
    monkeypatch.setattr(low_memory, "free_memory", lambda: most - 1)
    caplog.clear()
    check_memory(bundle, "onnxruntime", COMPONENTS, "cpu", low_memory=False)
    assert ["at their largest sizes" in record.getMessage() for record in caplog.records] == [True]
