"""Weights that change again and again in a TensorRT session: ONNX Runtime stands for the library, which needs a GPU."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_exports import small_pipeline

from engines.sessions.checks import Checked, check_engine
from engines.sessions.opening import open_session
from engines.sessions.trt import session as session_tensorrt
from engines.sessions.trt.opening import HalfRefitError
from engines.sessions.trt.session import TensorRTSession
from sdkd.bundle.manifest import Bundle
from sdkd.errors import EngineError
from sdkd.workflow import rebuild

TO_V = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v.weight"
FEEDS = {"sample": torch.ones(1, 4, 16, 16), "timestep": torch.tensor(5.0)}
FEEDS["encoder_hidden_states"] = torch.linspace(-1, 1, 77 * 32).reshape(1, 77, 32)


class Session(TensorRTSession):
    """What a TensorRT session does with weights, on an engine that ONNX Runtime opens and runs."""

    def __init__(self, checked: Checked) -> None:
        super().__init__(checked, cuda_graphs=False)
        self.device = torch.device("cpu")

    def _open_engine(self, checked: Checked) -> None:
        self._engine = open_session(checked.bundle, checked.record.slot, checked.record.component)

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
        for name, tensor in self._engine.run(feeds).items():
            outputs[name].copy_(tensor)


@pytest.fixture
def checked(engine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    """An engine of a bundle of one's own, where no CUDA is asked for."""
    monkeypatch.setattr(session_tensorrt, "require", lambda _: SimpleNamespace(__name__="stand-in"))
    monkeypatch.setattr(session_tensorrt, "recorder", lambda _: SimpleNamespace(messages=[]))
    monkeypatch.setattr(session_tensorrt, "captures_by_itself", lambda _: False)
    monkeypatch.setattr(session_tensorrt, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("engines.sessions.graphed.own_stream", lambda _: None)
    for name, stand in (("current_device", lambda: 0), ("Stream", lambda *_, **__: None), ("Event", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand)
    return check_engine(Bundle.open(shutil.copytree(engine_bundle, tmp_path / "bundle")), "onnxruntime", "unet")


def expected(factor: float) -> torch.Tensor:
    """What the eager UNet gives with one weight times a factor."""
    unet = small_pipeline().unet
    unet.get_parameter(TO_V).data *= factor
    with torch.no_grad():
        return unet(*FEEDS.values()).sample  # type: ignore[no-any-return]


def test_engines_without_refit_are_rebuilt_from_the_exported_bundle_each_time(checked: Checked) -> None:
    weight = small_pipeline().unet.state_dict()[TO_V]
    session = Session(checked)
    with pytest.raises(EngineError, match=r"was built for its own weights: .*--refit lora.*sdkd\.workflow\.rebuild"):
        session.swap({TO_V: weight * 3})
    session.rebuild = rebuild
    seen = []
    for factor in (1.0, 3.0, -2.0, 1.0):  # as opened, one LoRA, another, none
        if seen:
            session.swap({} if factor == 1.0 else {TO_V: weight * factor})
        seen.append(session.run(FEEDS)["out_sample"])
        torch.testing.assert_close(seen[-1], expected(factor), atol=1e-4, rtol=1e-4)
        assert session.checked is checked
    assert torch.equal(seen[0], seen[3])
    assert (seen[1] - seen[2]).abs().max() > 0.01


def test_a_refit_that_failed_is_undone(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = replace(checked, record=replace(checked.record, flags={"options": {"refit": "all"}}))
    weight = small_pipeline().unet.state_dict()[TO_V]
    session, works = Session(checked), [True, False, True]

    def refit(_: Any, engine: Any, __: Any, stored: Any, label: str, ___: Any) -> None:
        engine._swap(checked.bundle.path / "unet" / "model.onnx", stored)
        if not works.pop(0):
            raise HalfRefitError(f"{label}: TensorRT could not refit the engine")

    monkeypatch.setattr(session_tensorrt, "refit", refit)
    session.swap({TO_V: weight * 3})
    engine, before = session._engine, session.run(FEEDS)["out_sample"]
    with pytest.raises(HalfRefitError, match=r"TensorRT could not refit the engine"):
        session.swap({TO_V: weight * -2})
    assert session._engine is not engine  # which may hold some of the new weights
    assert torch.equal(session.run(FEEDS)["out_sample"], before)
    torch.testing.assert_close(before, expected(3.0), atol=1e-4, rtol=1e-4)
