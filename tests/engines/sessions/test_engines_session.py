"""Sessions: what is refused before an engine is opened, and what a call takes and gives."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from engine_bundles import CONTEXT, edit_engine, graph_unet, identity_unet, reference, replace_file, unet_feeds

from engines.sessions import base
from engines.sessions.base import EngineSession
from engines.sessions.checks import Profiles, check_engine
from engines.sessions.inductor_session import InductorSession
from engines.sessions.opening import open_session
from engines.sessions.openvino_session import OpenVinoSession
from engines.sessions.ranges import check_sizes, check_tensor
from export.build.ranges import Typed, parse_profiles, to_ranges
from export.build_cli import build_engine
from sdkd.bundle.manifest import Bundle, FileRecord
from sdkd.bundle.onnx_weights import torch_weights
from sdkd.core.contract import Precision, TensorSpec
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, EngineError, MissingExtraError, RangeError, StaleEngineError
from sdkd.targets.registry import built_environment

TARGETS = ("onnxruntime", "openvino", "inductor")


def run(session: EngineSession, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return session.run(feeds)["out_sample"]


# Refused before anything is deserialised


def test_engine_that_was_never_built_is_refused_with_the_command(graph: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no tensorrt engine for unet .* sdkd build-engine .* --target tensorrt"):
        open_session(graph, "tensorrt", "unet")


def engine_file(folder: Path, target: str) -> Path:
    return folder / Bundle.open(folder).engine(target, "unet").files[0].path


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_engines_are_refused_also_after_they_were_opened_once(graph_copy: Path, target: str) -> None:
    open_session(graph_copy, target, "unet").close()
    path = engine_file(graph_copy, target)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(BundleError, match=rf"{path.name} was altered: its SHA-256 differs"):
        open_session(graph_copy, target, "unet")
    path.write_bytes(data[:-10])
    with pytest.raises(BundleError, match=r"truncated or altered.*sdkd build-engine"):
        open_session(graph_copy, target, "unet")
    path.unlink()
    with pytest.raises(BundleError, match=rf"{path.name} is missing"):
        open_session(graph_copy, target, "unet")


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("onnxruntime", {"onnxruntime": "1.0"}, r"built with onnxruntime 1.0, here it is .*sdkd build-engine"),
        ("openvino", {"openvino": "1.0"}, r"built with openvino 1.0, here it is .*sdkd build-engine"),
        ("openvino", {"cpu": "Other 9000"}, r"built with cpu Other 9000, here it is"),
        ("onnxruntime", None, r"unet was exported again after the engine was built"),
    ],
)
def test_engines_of_another_place_are_refused_before_they_are_read(
    graph_copy: Path, target: str, changes: dict[str, str] | None, message: str
) -> None:
    replace_file(graph_copy, target, "unet", b"reading this would fail otherwise")
    other = {"environment": built_environment(target) | changes} if changes else {"onnx_sha256": "0" * 16}
    edit_engine(graph_copy, target, "unet", **other)
    with pytest.raises(StaleEngineError, match=message):
        open_session(graph_copy, target, "unet")


def as_target(folder: Path, target: str, **changes: object) -> Bundle:
    """The ONNX Runtime engine's record under another target, with a file that its library could not read."""
    bundle = Bundle.open(folder)
    path = folder / "engines" / target / "unet.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not an engine")
    files = (FileRecord.of(folder, path),)
    record = bundle.engine("onnxruntime", "unet")
    changed = {"target": target, "slot": target, "files": files, "environment": {}} | changes
    edited = Bundle(folder, bundle.manifest.with_engine(replace(record, **changed)))  # type: ignore[arg-type]
    edited.save()
    return edited


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_missing_extra_names_the_pip_command(graph_copy: Path) -> None:
    as_target(graph_copy, "tensorrt")
    with pytest.raises(MissingExtraError, match=r"pip install 'sdkd\[tensorrt\]'"):
        open_session(graph_copy, "tensorrt", "unet")


def test_rtx_engines_are_checked_before_the_gpu_is_asked_for(graph_copy: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    here = built_environment("tensorrt-rtx")
    as_target(graph_copy, "tensorrt-rtx", environment=here | {"tensorrt_rtx": "1.0.0"})
    with pytest.raises(StaleEngineError, match=r"built with tensorrt.rtx 1\.0\.0, here it is"):
        open_session(graph_copy, "tensorrt-rtx", "unet")
    as_target(graph_copy, "tensorrt-rtx", environment=here)
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"needs an NVIDIA GPU with a driver.*--target onnxruntime"):
            open_session(graph_copy, "tensorrt-rtx", "unet")


def test_engine_for_another_gpu_is_stale(graph_copy: Path) -> None:
    bundle = as_target(graph_copy, "tensorrt-rtx", built_for=("8.6", "8.9"))
    here = {"compute_capability": "9.0"}
    with pytest.raises(StaleEngineError, match=r"built for compute capability 8.6, 8.9, here it is 9.0"):
        bundle.check_fresh(bundle.engine("tensorrt-rtx", "unet"), here)


def test_engine_that_the_library_refuses_after_all(graph_copy: Path) -> None:
    replace_file(graph_copy, "onnxruntime", "unet", b"no ONNX at all")
    with pytest.raises(EngineError, match=r"could not be opened by ONNX Runtime"):
        open_session(graph_copy, "onnxruntime", "unet")
    replace_file(graph_copy, "openvino", "unet", b"no blob at all")
    with pytest.raises(EngineError, match=r"could not be opened by OpenVINO"):
        open_session(graph_copy, "openvino", "unet")


def test_weights_from_a_file_that_the_manifest_does_not_list_are_refused(graph_copy: Path) -> None:
    path = engine_file(graph_copy, "onnxruntime")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="other.data", size_threshold=0)
    replace_file(graph_copy, "onnxruntime", "unet", path.read_bytes())
    with pytest.raises(BundleError, match=r"unet\.onnx' keeps its weight .*other\.data.*: do not trust this bundle"):
        open_session(graph_copy, "onnxruntime", "unet")


def test_check_engine_knows_the_limits(graph: Bundle) -> None:
    checked = check_engine(graph, "openvino", "unet")
    assert checked.limits["batch"] == Range(1, 2, 4)  # two halves of guidance
    assert checked.limits["height"] == Range(16, 16, 32)
    assert checked.steps == {"height": 2, "width": 2}
    assert checked.path == graph.path / "engines/openvino/unet.blob"


# A call


@pytest.mark.parametrize(
    ("target", "precision"),  # inductor in bf16 is built for real elsewhere: test_export_build_inductor.py
    [*((target, "fp16") for target in TARGETS), ("onnxruntime", "bf16"), ("openvino", "bf16")],
)
def test_half_precisions_in_and_out(tmp_path: Path, target: str, precision: Precision) -> None:
    make = identity_unet if precision == "bf16" else lambda folder, kind, name: graph_unet(folder, kind, (name,))
    bundle, feeds = make(tmp_path / "bundle", precision, target), unet_feeds(precision)
    with open_session(bundle, target, "unet") as session:
        result = run(session, feeds)
    assert result.dtype == feeds["sample"].dtype
    if precision == "bf16":
        assert torch.equal(result, feeds["sample"])
    else:
        assert torch.allclose(result, reference(bundle, "unet", feeds), atol=5e-3)


@pytest.mark.parametrize("target", TARGETS)
def test_sizes_across_the_range(graph: Bundle, target: str) -> None:
    with open_session(graph, target, "unet") as session:
        for batch, size in ((1, 16), (4, 32), (1, 32), (3, 16)):
            feeds = unet_feeds(batch=batch, size=size)
            assert torch.allclose(run(session, feeds), reference(graph, "unet", feeds), atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_are_fresh_and_inputs_untouched(graph: Bundle, target: str) -> None:
    feeds = unet_feeds()
    before = {name: tensor.clone() for name, tensor in feeds.items()}
    with open_session(graph, target, "unet") as session:
        first = run(session, feeds)
        kept = first.clone()
        second = run(session, feeds | {"timestep": torch.tensor(7.0)})
        assert len({first.data_ptr(), second.data_ptr(), *(tensor.data_ptr() for tensor in feeds.values())}) == 5
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert all(torch.equal(before[name], feeds[name]) for name in feeds)


@pytest.mark.parametrize("target", TARGETS)
def test_views_gradients_and_strides_are_accepted(graph: Bundle, target: str) -> None:
    feeds = unet_feeds(batch=4)
    feeds["sample"] = feeds["sample"].to(memory_format=torch.channels_last).requires_grad_()
    feeds["encoder_hidden_states"] = feeds["encoder_hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    with open_session(graph, target, "unet") as session:
        result = run(session, feeds)
        half = run(session, {k: v[2:] if v.dim() else v for k, v in feeds.items()})
    assert torch.allclose(result, reference(graph, "unet", feeds), atol=1e-5)
    assert torch.equal(half, result[2:])
    assert not result.requires_grad


def test_onnxruntime_s_threads_rest_between_calls(graph: Bundle) -> None:
    with open_session(graph, "onnxruntime", "unet") as session:
        options = session._session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_threads_share_a_session(graph: Bundle, target: str) -> None:
    results: dict[int, torch.Tensor] = {}
    options = {} if target == "inductor" else {"threads": 1}  # torch's threads are the process's
    with open_session(graph, target, "unet", **options) as session:

        def work(number: int) -> None:
            for _ in range(20):
                results[number] = run(session, unet_feeds() | {"timestep": torch.tensor(float(number))})

        workers = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    feeds = unet_feeds()
    for number, result in results.items():
        feeds["timestep"] = torch.tensor(float(number))
        assert torch.allclose(result, reference(graph, "unet", feeds), atol=1e-5)


def test_asking_outside_the_range_shows_the_command_that_covers_both(graph: Bundle) -> None:
    with open_session(graph, "onnxruntime", "unet") as session:
        with pytest.raises(
            RangeError,
            match=r"asked for batch 3 \(5 with guidance\), height 96 px, width 96 px, tokens 77, "
            r"and was built for batch 1\.\.2, height 32\.\.64 px, width 32\.\.64 px, 77 tokens\. "
            r"Build one that covers both with: sdkd build-engine .* --target onnxruntime --size 32\.\.96 "
            r"--batch 1\.\.3 --tokens 77",
        ):
            session.run(unet_feeds(batch=5, size=48))
        with pytest.raises(RangeError, match=r"height 34 is not a multiple of 4 pixels.*use 32 or 36"):
            session.run(unet_feeds(size=17))
        feeds = unet_feeds() | {"encoder_hidden_states": torch.zeros(2, 50, CONTEXT)}
        with pytest.raises(RangeError, match=r"tokens 50.*--tokens 50\.\.77\.\.77"):
            session.run(feeds)


@pytest.mark.parametrize(("batch", "size"), [(5, 48), (2, 8), (1, 34)])
def test_the_shown_command_covers_both(graph: Bundle, batch: int, size: int) -> None:
    with (
        open_session(graph, "onnxruntime", "unet") as session,
        pytest.raises(RangeError, match=r"covers both with: sdkd build-engine ") as caught,
    ):
        session.run(unet_feeds(batch=batch, size=size))
    words = str(caught.value).split("sdkd build-engine ")[1].split()
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert {word.removeprefix("--") for word in options} <= set(inspect.signature(build_engine).parameters)
    typed = Typed((options["--size"],), batch=options["--batch"], tokens=options["--tokens"])
    ranges = to_ranges(typed, graph)
    for name in ("batch", "height", "width", "sequence"):
        built = getattr(graph.engine("onnxruntime", "unet").ranges, name)
        assert built.min in getattr(ranges, name)
        assert built.max in getattr(ranges, name)
    assert 2 * size in ranges.height
    assert -(-batch // 2) in ranges.batch


def test_between_two_profiles_is_outside(graph_copy: Path) -> None:
    small = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))
    large = ShapeRanges(Range.fixed(1), Range(32, 64, 64), Range(32, 64, 64), Range.fixed(77))
    bundle = edit_engine(graph_copy, "onnxruntime", "unet", profiles=(small, large))
    checked = check_engine(bundle, "onnxruntime", "unet")
    assert check_sizes(checked, {"batch": 2, "height": 16, "width": 16, "sequence": 77}) == 0
    assert check_sizes(checked, {"batch": 2, "height": 16, "width": 32, "sequence": 77}) == 1
    with open_session(bundle, "onnxruntime", "unet") as session:
        session.run(unet_feeds(batch=2, size=32))
        session.run(unet_feeds(batch=4, size=16))
        with pytest.raises(
            RangeError,
            match=r"asked for batch 2 \(4 with guidance\), height 64 px, width 64 px, tokens 77, and was built for "
            r"batch 1\.\.2, height 32 px, width 32 px, 77 tokens and for batch 1, height 32\.\.64 px, .*"
            r"covers all with: sdkd build-engine",
        ) as caught:
            session.run(unet_feeds(batch=4, size=32))
    texts = re.findall(r'--profile "([^"]*)"', str(caught.value))
    exactly = ShapeRanges(Range.fixed(2), Range.fixed(64), Range.fixed(64), Range.fixed(77))
    assert parse_profiles(texts, Typed(), bundle) == (small, large, exactly)


def test_a_fixed_range_is_shown_as_one_size(graph_copy: Path) -> None:
    fixed = ShapeRanges(Range.fixed(1), Range.fixed(32), Range.fixed(64), Range.fixed(77))
    checked = check_engine(edit_engine(graph_copy, "onnxruntime", "unet", profiles=(fixed,)), "onnxruntime", "unet")
    with pytest.raises(RangeError, match=r"built for batch 1, height 32 px, width 64 px.*--size 32x32\.\.64\.\.64"):
        check_sizes(checked, {"batch": 1, "height": 16, "width": 16, "sequence": 77})


def test_feeds_that_do_not_fit_the_contract_are_named(graph: Bundle) -> None:
    feeds = unet_feeds()
    with open_session(graph, "onnxruntime", "unet") as session:
        with pytest.raises(EngineError, match=r"takes sample, timestep, encoder_hidden_states, not sample"):
            session.run({"sample": feeds["sample"]})
        with pytest.raises(EngineError, match=r"'sample' is torch.float16, .* takes float32"):
            session.run(feeds | {"sample": feeds["sample"].half()})
        with pytest.raises(
            EngineError, match=r"'sample' has shape \(2, 16, 16\), .* takes \(batch, 4, height, width\)"
        ):
            session.run(feeds | {"sample": feeds["sample"][:, 0]})
        with pytest.raises(EngineError, match=r"'sample' has shape \(2, 3, 16, 16\)"):
            session.run(feeds | {"sample": feeds["sample"][:, :3]})
        fixed = TensorSpec("sample", "float32", (2, 4, 16, 16))
        with pytest.raises(EngineError, match=r"takes \(2, 4, 16, 16\): its shapes were fixed by --static, export the"):
            check_tensor("the engine", fixed, torch.float32, (1, 4, 16, 16))
        with pytest.raises(EngineError, match=r"'encoder_hidden_states' has batch 1, another input has 2"):
            session.run(feeds | {"encoder_hidden_states": feeds["encoder_hidden_states"][:1]})


@pytest.mark.parametrize("target", TARGETS)
def test_closing_under_another_thread_s_calls_is_said(graph: Bundle, target: str) -> None:
    session, begun, errors = open_session(graph, target, "unet"), threading.Event(), list[EngineError]()

    def work() -> None:
        try:
            while True:
                run(session, unet_feeds())
                begun.set()
        except EngineError as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    assert begun.wait(60)
    session.close()
    session.close()
    worker.join(60)
    assert ["is closed: open it again" in str(error) for error in errors] == [True]
    with pytest.raises(EngineError, match=r"is closed: open it again"):
        session.swap({})


def test_a_session_that_is_closed_while_a_call_is_checked_does_not_run(
    graph: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, signature = open_session(graph, "openvino", "unet"), base.signature
    monkeypatch.setattr(base, "signature", lambda *values: (session.close(), signature(*values))[1])
    with pytest.raises(EngineError, match=r"is closed: open it again"):
        run(session, unet_feeds())
    session = open_session(graph, "openvino", "unet")
    monkeypatch.setattr(base, "stored_weights", lambda *values: (session.close(), {})[1])
    with pytest.raises(EngineError, match=r"is closed: open it again"):
        session.swap({})


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_and_outputs_are_torch_s_own_memory(graph: Bundle, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds, seen = unet_feeds(), dict[str, int]()
    with open_session(graph, target, "unet") as session:
        if target == "inductor":
            assert isinstance(session, InductorSession)
            code, addresses = session._package.run, list[list[int]]()

            def noted(profile: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
                found = code(profile, inputs)
                addresses.append([tensor.data_ptr() for tensor in (*inputs, *found)])
                return found

            monkeypatch.setattr(session._package, "run", noted)
            result = run(session, feeds)
            assert addresses == [[tensor.data_ptr() for tensor in (*feeds.values(), result)]]
            return
        execute = session._execute

        def look(ready: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
            seen.update({name: tensor.data_ptr() for name, tensor in {**ready, **outputs}.items()})
            execute(ready, outputs, profile)

        monkeypatch.setattr(session, "_execute", look)
        result = run(session, feeds)
        if target == "openvino":  # ONNX Runtime is given the addresses themselves
            shared = {name: session._shared(tensor).data.ctypes.data for name, tensor in feeds.items()}  # type: ignore[attr-defined]
            assert shared == {name: tensor.data_ptr() for name, tensor in feeds.items()}
    assert seen == {name: tensor.data_ptr() for name, tensor in {**feeds, "out_sample": result}.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_tensor_that_is_given_again_is_read_again(graph: Bundle, target: str) -> None:
    feeds = unet_feeds()
    text = feeds["encoder_hidden_states"]
    with open_session(graph, target, "unet") as session:
        before = run(session, feeds)
        text.mul_(2)  # in place: the same tensor, other values
        changed = run(session, feeds)
        assert torch.equal(changed, run(session, feeds | {"encoder_hidden_states": text.clone()}))
        assert (changed - before).abs().max() > 1e-3
        text.data = text / 2  # the same tensor, other memory
        assert torch.equal(run(session, feeds), before)
        grown = torch.cat([text, text])
        twice = {name: torch.cat([tensor] * 2) if tensor.dim() else tensor for name, tensor in feeds.items()}
        assert torch.allclose(run(session, twice | {"encoder_hidden_states": grown})[:2], before, atol=1e-5)
        assert torch.equal(run(session, feeds), before)


def test_a_model_in_openvino_is_let_go_of_when_weights_change(graph: Bundle) -> None:
    session = open_session(graph, "openvino", "unet")
    assert isinstance(session, OpenVinoSession)
    feeds = unet_feeds()

    def ran() -> weakref.ref[Any]:
        run(session, feeds)
        assert session._models is not None
        return weakref.ref(session._models.of({name: tensor.shape for name, tensor in feeds.items()})[1])

    first = ran()
    assert first() is not None
    name, weight = next(iter(torch_weights(session.checked.graph).items()))
    session.swap({name: weight})
    assert first() is None  # before the next run
    second = ran()
    session.close()
    assert second() is None


# Optimization profiles


def unet(batch: int, low: int, high: int) -> dict[str, Range]:
    """A UNet's profile: 1 to `batch` latents, `low` to `high` on a side."""
    side = Range(low, low, high)
    return {"batch": Range(1, 1, batch), "height": side, "width": side, "sequence": Range.fixed(77)}


def sizes(batch: int, height: int, width: int) -> dict[str, int]:
    return {"batch": batch, "height": height, "width": width, "sequence": 77}


def test_the_smallest_profile_that_fits_is_picked() -> None:
    profiles = Profiles([unet(8, 16, 64), unet(2, 16, 32)])
    asked = ((2, 16, 16), (2, 32, 48), (8, 16, 16), (9, 16, 16), (2, 8, 8))
    assert [profiles.pick(sizes(*one)) for one in asked] == [1, 0, 0, None, None]
    many, large = (unet(6, 64, 64), unet(2, 64, 128))  # more latents, less text, which does not count
    assert Profiles([many, large]).pick(sizes(2, 64, 64)) == 0
    assert Profiles([large, many]).pick(sizes(2, 64, 64)) == 1
    assert Profiles([many, large]).pick(sizes(2, 64, 72)) == 1
    texts = [{"batch": Range(1, 1, most), "sequence": Range.fixed(77)} for most in (8, 2)]
    assert Profiles(texts).pick({"batch": 1, "sequence": 77}) == 1
    assert Profiles([{}]).pick({}) == 0  # fixed shapes


def test_the_largest_batch_is_that_of_profiles_of_the_other_sizes() -> None:
    profiles = Profiles([unet(8, 8, 16), unet(2, 8, 32)])
    asked = ((1, 16, 16), (1, 32, 32), (9, 32, 16), (1, 64, 64))
    assert [profiles.largest_batch(sizes(*one)) for one in asked] == [8, 2, 2, None]
