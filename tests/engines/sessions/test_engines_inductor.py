"""Engines that PyTorch compiled: what a call gives, other weights in place, and whose code is opened at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from engine_bundles import edit_engine, graph_unet, reference, unet_feeds
from made_once import made_once

from engines.sessions.inductor_session import InductorSession
from engines.sessions.opening import open_session
from export import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import torch_weights
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, EngineError, ModelError, RangeError, StaleEngineError
from sdkd.targets import native_code, registry

SMALL = ShapeRanges(Range.fixed(1), Range.fixed(32), Range.fixed(32), Range.fixed(77))
LARGE = ShapeRanges(Range(1, 2, 2), Range(32, 64, 64), Range(32, 64, 96), Range(77, 77, 154))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The hand-written UNet, compiled for one fixed shape and for a range."""

    def make(folder: Path) -> None:
        graph = graph_unet(folder, targets=())
        build_engine(graph, "inductor", ranges=(SMALL, LARGE), components=("unet",))

    return Bundle.open(made_once("graph-unet-inductor", make))


def output(session: InductorSession, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return session.run(feeds)["out_sample"]


@pytest.mark.parametrize(
    ("batch", "height", "width"), [(2, 16, 16), (4, 16, 16), (2, 24, 32), (4, 32, 48), (3, 32, 32)]
)
def test_every_size_of_every_profile_gives_what_the_graph_does(
    bundle: Bundle, batch: int, height: int, width: int
) -> None:
    feeds = unet_feeds(batch=batch)
    feeds["sample"] = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))
    with open_session(bundle, "inductor", "unet") as session:
        found = session.run(feeds)["out_sample"]
    torch.testing.assert_close(found, reference(bundle, "unet", feeds), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()


def test_the_package_holds_code_alone_and_its_record_says_what_it_depends_on(bundle: Bundle) -> None:
    record = bundle.engine("inductor", "unet")
    assert [Path(file.path).name for file in record.files] == ["unet.pt2"]
    assert record.flags["weights"] == "graph"
    assert record.flags["device"] == "cpu"
    assert record.flags["compiler"] not in ("", "unknown")
    assert record.environment["torch"] == torch.__version__
    assert {"device", "cpu", "cpu_units", "platform"} <= set(record.environment)
    assert record.parity is not None
    assert record.parity["relative"] < 1e-5
    assert record.profiles == (SMALL, LARGE)


def test_a_size_beyond_all_profiles_is_refused(bundle: Bundle) -> None:
    with open_session(bundle, "inductor", "unet") as session, pytest.raises(RangeError, match="width"):
        session.run(unet_feeds() | {"sample": torch.zeros(2, 4, 16, 64)})


def test_outputs_are_fresh_tensors(bundle: Bundle) -> None:
    feeds = unet_feeds()
    with open_session(bundle, "inductor", "unet") as session:
        first, second = (session.run(feeds)["out_sample"] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


def test_other_weights_are_written_in_place_and_taken_away_exactly(bundle: Bundle) -> None:
    feeds, graph = unet_feeds(), bundle.path / "unet" / "model.onnx"
    exported = torch_weights(graph)
    with open_session(bundle, "inductor", "unet") as session:
        before = session.run(feeds)["out_sample"]
        session.swap({"conv": torch.zeros_like(exported["conv"])})
        context = (feeds["encoder_hidden_states"].mean(1) @ exported["to_out"])[:, :, None, None]
        torch.testing.assert_close(session.run(feeds)["out_sample"], context.expand_as(before), atol=1e-5, rtol=1e-5)
        session.swap({"to_out": 2 * exported["to_out"].double()})  # and the convolution comes back
        torch.testing.assert_close(session.run(feeds)["out_sample"], before + context, atol=1e-4, rtol=1e-4)
        session.swap({})
        assert torch.equal(session.run(feeds)["out_sample"], before)


def test_weights_that_do_not_fit_leave_the_engine_as_it_is(bundle: Bundle) -> None:
    feeds = unet_feeds()
    with open_session(bundle, "inductor", "unet") as session:
        before = session.run(feeds)["out_sample"]
        with pytest.raises(BundleError, match=r"does not hold 1 of 1 weights by name \(first: other\)"):
            session.swap({"other": torch.zeros(1)})
        with pytest.raises(ModelError, match=r"weight 'conv' has shape \(1, 4, 3, 3\), the engine's is \(4, 4, 3, 3\)"):
            session.swap({"to_out": torch.zeros(32, 4), "conv": torch.zeros(1, 4, 3, 3)})
        assert torch.equal(session.run(feeds)["out_sample"], before)


def test_a_session_opened_in_inference_mode_takes_other_weights_outside_of_it(bundle: Bundle) -> None:
    feeds = unet_feeds()
    with torch.inference_mode():
        session = open_session(bundle, "inductor", "unet")
        before = session.run(feeds)["out_sample"].clone()
    session.swap({"conv": torch.zeros(4, 4, 3, 3)})
    assert not torch.equal(session.run(feeds)["out_sample"], before)
    session.close()
    with pytest.raises(EngineError, match="is closed"):
        session.run(feeds)


# Whose code is opened


@pytest.fixture
def elsewhere(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle as somebody else has it, who did not build it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-home"))
    return bundle.path


def test_code_that_somebody_else_made_is_not_opened(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Bundle.open(elsewhere).engine("inductor", "unet").files[0].sha256
    wanted = rf"is code that would run with all your rights, .*sdkd build-engine .*SDKD_TRUSTED={digest}"
    with pytest.raises(EngineError, match=wanted):
        open_session(elsewhere, "inductor", "unet")
    monkeypatch.setenv(native_code.VARIABLE, f"{'0' * 64}, {digest}")
    open_session(elsewhere, "inductor", "unet").close()


def test_only_the_bytes_that_were_checked_are_run(tmp_path: Path) -> None:
    file = tmp_path / "unet.pt2"
    file.write_bytes(b"other code")
    with pytest.raises(EngineError, match=r"unet.pt2' was altered: its SHA-256 differs"):
        native_code.private_copy(file, "0" * 64, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("torch", "2.0.0", r"built with torch 2.0.0, here it is"),
        ("device", "cuda", r"built with device cuda, here it is cpu"),
        ("cpu_units", "0123456789ab", r"built with cpu units 0123456789ab, here it is"),
    ],
)
def test_packages_of_another_place_are_refused_before_they_are_opened(
    bundle: Bundle, tmp_path: Path, key: str, value: str, message: str
) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    built = Bundle.open(copy).engine("inductor", "unet").environment
    edit_engine(copy, "inductor", "unet", environment={**built, key: value})
    with pytest.raises(StaleEngineError, match=message):
        open_session(copy, "inductor", "unet")


def test_a_package_for_another_gpu_is_refused(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = {"gpu": "NVIDIA H200", "compute_capability": "9.0"}
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    monkeypatch.setattr(registry, "gpu", lambda: h200)
    edit_engine(copy, "inductor", "unet", environment=registry.built_environment("inductor"))
    monkeypatch.setattr(registry, "gpu", lambda: {"gpu": "NVIDIA A100", "compute_capability": "8.0"})
    with pytest.raises(StaleEngineError, match=r"built with gpu NVIDIA H200, here it is NVIDIA A100"):
        open_session(copy, "inductor", "unet")
