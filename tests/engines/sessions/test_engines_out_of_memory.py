"""Memory that runs out: one error with the numbers and the way out, nothing kept, and what was open stays usable."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from engine_bundles import unet_feeds

from engines import load_pipeline, plug
from engines.sessions.base import EngineSession
from engines.sessions.onnxruntime_session import OnnxRuntimeSession
from engines.sessions.opening import open_session
from engines.sessions.out_of_memory import is_out_of_memory, raises_out_of_memory
from engines.sessions.trt.context import failure
from sdkd.bundle.manifest import Bundle
from sdkd.errors import EngineError, OutOfMemoryError, RangeError

# Words of the libraries, as they were reported.
TENSORRT = "[defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)"
LOAD = "[safeDeserialize.cpp::load::269] Error Code 2: OutOfMemory (no further information)"
ONNXRUNTIME = "Failed to allocate memory for requested buffer of size 1073741824"


def allocate_too_much() -> torch.Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)  # 2^60 bytes


def test_what_the_libraries_call_it() -> None:
    for words in (TENSORRT, LOAD, ONNXRUNTIME, "std::bad_alloc", "CUDA error: out of memory"):
        assert is_out_of_memory(EngineError(f"the unet engine failed: {words}"))
        assert not is_out_of_memory(ValueError(words))
    messages = [TENSORRT]  # what a library said counts once
    found = [is_out_of_memory(failure("the engine", "tensorrt", messages, "queueing")) for _ in range(2)]
    assert found == [True, False]
    with pytest.raises(RuntimeError, match=r"allocate") as caught:
        allocate_too_much()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(RangeError("asked for batch 9"))


def failing(kept: list[Any], error: Callable[[], BaseException]) -> Callable[..., None]:
    """Work that allocates a tensor, notes it, and fails."""

    def work(*_: Any) -> None:
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise error()

    return work


def test_a_failed_run_says_the_sizes_and_keeps_nothing(graph: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds, kept = unet_feeds(), []  # type: ignore[var-annotated]
    with open_session(graph, "onnxruntime", "unet") as session:
        expected = session.run(feeds)["out_sample"]
        outputs: list[Any] = []

        def execute(ready: dict[str, torch.Tensor], made: dict[str, torch.Tensor], profile: int) -> None:
            outputs.extend(weakref.ref(tensor) for tensor in made.values())
            failing(kept, lambda: EngineError(ONNXRUNTIME))()

        monkeypatch.setattr(session, "_execute", execute)
        with pytest.raises(
            OutOfMemoryError,
            match=r"the onnxruntime engine of unet in '.*', run at batch 2, height 16, width 16, sequence 77, ran out "
            r"of memory \(Failed to allocate .*\): [\d.,]+ GB are free now\. Ask for fewer images at once",
        ) as caught:
            session.run(feeds)
        assert isinstance(caught.value.__cause__, EngineError)  # the error is still held, and what it saw is not
        assert [reference() for reference in (*kept, *outputs)] == [None, None]
        monkeypatch.setattr(session, "_execute", failing([], lambda: EngineError("a kernel is missing")))
        with pytest.raises(EngineError, match=r"^a kernel is missing$") as other:
            session.run(feeds)
        assert not isinstance(other.value, OutOfMemoryError)
        monkeypatch.undo()
        assert torch.equal(session.run(feeds)["out_sample"], expected)


def break_opening(monkeypatch: pytest.MonkeyPatch, times: int, after: int = 0) -> list[str]:
    """ONNX Runtime opens `after` graphs, then refuses `times` for want of memory; what it opened, in order."""
    opened, tries, original = [], [0], OnnxRuntimeSession._opened  # type: ignore[var-annotated]

    def open_or_not(self: OnnxRuntimeSession, *arguments: Any) -> Any:
        tries[0] += 1
        if after < tries[0] <= after + times:
            raise EngineError(f"{self.checked.label} was refused ({LOAD})")
        opened.append(self.checked.record.component)
        return original(self, *arguments)

    monkeypatch.setattr(OnnxRuntimeSession, "_opened", open_or_not)
    return opened


def test_opening_is_tried_once_more_after_memory_was_given_back(graph: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = break_opening(monkeypatch, times=1)
    with open_session(graph, "onnxruntime", "unet") as session:
        assert opened == ["unet"]
        assert session.run(unet_feeds())["out_sample"].isfinite().all()
    monkeypatch.undo()
    opened = break_opening(monkeypatch, times=2)  # and not twice
    with pytest.raises(
        OutOfMemoryError,
        match=r"opening the onnxruntime engine of unet in '.*' ran out of memory \(.*OutOfMemory.*\): [\d.,]+ GB are "
        r"free now\. Close other programs, or open the engines in turn: low_memory=True$",
    ):
        open_session(graph, "onnxruntime", "unet")
    assert opened == []


@pytest.mark.parametrize("way", ["plug", "load"])
def test_engines_that_were_open_are_closed_again(
    engine_bundle: Path, eager: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    before = {name: getattr(eager, name) for name in ("unet", "vae", "text_encoder")}
    closed: list[str] = []
    release = OnnxRuntimeSession._release

    def released(self: EngineSession) -> None:
        closed.append(self.checked.record.component)
        release(self)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntimeSession, "_release", released)
    opened = break_opening(monkeypatch, times=2, after=2)
    with pytest.raises(OutOfMemoryError, match=r"opening the onnxruntime engine of vae_encoder"):
        _ = plug(eager, engine_bundle, "onnxruntime") if way == "plug" else load_pipeline(engine_bundle, "onnxruntime")
    assert sorted(closed) == sorted(opened) == ["unet", "vae_decoder"]
    assert {name: getattr(eager, name) for name in before} == before
    monkeypatch.undo()
    plug(eager, engine_bundle, "onnxruntime")


def test_other_weights_that_do_not_fit_leave_the_old_ones(engine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(engine_bundle, "onnxruntime", "unet") as session:
        feeds = unet_feeds()
        before = session.run(feeds)["out_sample"]
        break_opening(monkeypatch, times=9)
        with pytest.raises(
            OutOfMemoryError, match=r"the onnxruntime engine of unet .*, given other weights, ran out of"
        ):
            session.swap({"conv_out.bias": torch.ones(4)})
        assert torch.equal(session.run(feeds)["out_sample"], before)
        monkeypatch.undo()
        session.swap({"conv_out.bias": torch.ones(4)})
        assert not torch.equal(session.run(feeds)["out_sample"], before)


def test_one_error_is_told_once() -> None:
    with (
        pytest.raises(
            OutOfMemoryError, match=r"^the inner ran out of memory \(no words\.\): .* are free now\. Wait\.$"
        ),
        raises_out_of_memory("the outer", "Hurry.", on_gpu=False),
        raises_out_of_memory("the inner", "Wait.", on_gpu=False),
    ):
        raise torch.cuda.OutOfMemoryError("no words.")
