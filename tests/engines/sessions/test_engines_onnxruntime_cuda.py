"""Which file and which device an ONNX Runtime session takes, by what its engine was built for and what runs here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from engine_bundles import edit_engine, graph_unet, reference, unet_feeds
from small_exports import small_pipeline

from engines.pipelines import pipeline
from engines.sessions import onnxruntime_session as session_onnxruntime
from engines.sessions.opening import expected_device, open_session
from sdkd.bundle.manifest import Bundle
from sdkd.errors import EngineError, InputError
from sdkd.targets.ort_providers import CUDA, LIBRARY_NAMES, RTX

PROFILE = {
    "sample": ((1, 4, 16, 16), (2, 4, 16, 16), (4, 4, 32, 32)),
    "timestep": ((), (), ()),
    "encoder_hidden_states": ((1, 77, 32), (2, 77, 32), (4, 77, 32)),
}
ENGINE, EXPORTED = "engines/onnxruntime/unet.onnx", "unet/model.onnx"


def built_for(bundle: Path, provider: str | None) -> Bundle:
    """The engine as if it was built for a provider; None: by a version that did not say."""
    return edit_engine(bundle, "onnxruntime", "unet", flags={"provider": provider} if provider else {})


@pytest.mark.parametrize(
    ("built", "runs", "file"),
    [
        ("cpu", "cpu", ENGINE),
        (None, "cpu", ENGINE),
        ("cuda", "cpu", EXPORTED),
        ("cpu", "cuda", EXPORTED),
        (None, "cuda", EXPORTED),
        ("cuda", "cuda", ENGINE),
        ("cpu", RTX, EXPORTED),
        ("cuda", RTX, EXPORTED),
        (RTX, "cpu", EXPORTED),
        (RTX, RTX, ENGINE),
    ],
)
def test_the_file_is_the_one_made_for_where_it_runs(
    graph_copy: Path, monkeypatch: pytest.MonkeyPatch, built: str | None, runs: str, file: str
) -> None:
    opened: list[tuple[str, dict[str, Any]]] = []
    original = session_onnxruntime.open_session

    def open_on_the_cpu(model: str, options: Any, provider: str, **where: Any) -> Any:
        assert provider == runs
        opened.append((model, where))
        return original(model, options)

    monkeypatch.setattr(session_onnxruntime, "open_session", open_on_the_cpu)
    monkeypatch.setattr(session_onnxruntime, "usual_provider", lambda: runs)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with open_session(built_for(graph_copy, built), "onnxruntime", "unet") as session:
        assert str(session.device) == ("cpu" if runs == "cpu" else "cuda:1")
        session._swap(Path(), {})  # back to the weights as exported
    wanted = (
        str(graph_copy / file),
        {"device": 0 if runs == "cpu" else 1, "profile": PROFILE if runs == RTX else None},
    )
    assert opened == [wanted, wanted]


def test_engines_are_opened_on_the_gpu_of_the_pipeline(engine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current, opened = [0], []

    @contextlib.contextmanager
    def device(place: torch.device) -> Iterator[None]:
        before, current[0] = current[0], place.index
        yield
        current[0] = before

    def build(bundle: Any, slot: str, part: str, *more: Any, **_: Any) -> Any:
        with more[-1](part) as session:  # whose tensors are on no GPU, since there is none
            opened.append(str(session.device))
        raise EngineError("as far as it goes without a GPU")

    original = session_onnxruntime.open_session
    monkeypatch.setattr(
        session_onnxruntime, "open_session", lambda model, options, *_, **more: original(model, options)
    )
    monkeypatch.setattr(session_onnxruntime, "usual_provider", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(pipeline, "build_module", build)
    pipe = small_pipeline()
    monkeypatch.setattr(type(pipe.unet), "device", property(lambda _: torch.device("cuda", 1)))
    with pytest.raises(EngineError, match="as far as it goes"):
        pipeline.plug(pipe, engine_bundle, "onnxruntime", components=["unet"])
    assert opened == ["cuda:1"]


def test_an_engine_built_for_cuda_runs_on_a_cpu(graph_copy: Path) -> None:
    bundle, feeds = built_for(graph_copy, "cuda"), unet_feeds()
    with open_session(bundle, "onnxruntime", "unet", provider="cpu") as session:
        torch.testing.assert_close(session.run(feeds)["out_sample"], reference(bundle, "unet", feeds))


def test_what_was_asked_for_is_had_or_refused(graph_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_onnxruntime, "provider_problem", lambda _: "libraries did not load")
    match = r"cannot run on CUDAExecutionProvider here: libraries did not load; or open it with provider='cpu'"
    with pytest.raises(EngineError, match=match):
        open_session(Bundle.open(graph_copy), "onnxruntime", "unet", provider="cuda")
    monkeypatch.setattr(session_onnxruntime, "provider_problem", lambda _: None)
    assert session_onnxruntime.chosen_provider("cuda") == "cuda"
    monkeypatch.setattr(session_onnxruntime, "usual_provider", lambda: "cuda")
    assert session_onnxruntime.chosen_provider("cpu") == "cpu"
    with pytest.raises(InputError, match="provider 'rocm' is unknown: choose one of cpu, cuda, tensorrt-rtx"):
        session_onnxruntime.chosen_provider("rocm")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_session_that_is_not_on_cuda_after_all_is_refused(graph_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_onnxruntime, "usual_provider", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    match = r"the onnxruntime engine of unet .* was asked for CUDAExecutionProvider and gave CPUExecutionProvider"
    with pytest.raises(EngineError, match=match):
        open_session(built_for(graph_copy, "cuda"), "onnxruntime", "unet")


def test_the_expected_device_is_that_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for runs, device in (("cuda", "cuda"), ("tensorrt-rtx", "cuda"), ("cpu", "cpu")):
        monkeypatch.setattr(session_onnxruntime, "usual_provider", lambda runs=runs: runs)
        assert expected_device("onnxruntime").type == device


def test_gpu_engine_is_built_for_cuda_and_opened_as_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if LIBRARY_NAMES[CUDA] not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    opened: list[str] = []
    original = session_onnxruntime.open_session

    def noted(model: str, *arguments: Any, **where: Any) -> Any:
        opened.append(model)
        return original(model, *arguments, **where)

    monkeypatch.setattr(session_onnxruntime, "open_session", noted)
    bundle, feeds = graph_unet(tmp_path / "bundle", "fp32", ("onnxruntime",)), unet_feeds()
    assert bundle.engine("onnxruntime", "unet").flags["provider"] == "cuda"
    for provider, file in (("cuda", ENGINE), ("cpu", EXPORTED)):
        with open_session(bundle, "onnxruntime", "unet", provider=provider) as session:
            assert session.device.type == provider
            result = session.run({name: tensor.to(session.device) for name, tensor in feeds.items()})["out_sample"]
            torch.testing.assert_close(result.cpu(), reference(bundle, "unet", feeds), rtol=1e-4, atol=1e-4)
        assert opened[-1] == str(bundle.path / file)
