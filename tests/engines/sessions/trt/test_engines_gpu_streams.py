"""On any GPU, whatever TensorRT says of it: a session's streams, events, buffers, graphs and memory.

A small library stands for TensorRT: its engine computes with torch on the stream, at the addresses and in the
activation memory that it is given, and writes nothing anywhere else.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_bundles import graph_unet, unet_feeds

from engines.sessions.checks import Checked, Profiles, check_engine
from engines.sessions.cuda_graphs import CAPACITY
from engines.sessions.trt import session as session_tensorrt
from engines.sessions.trt.session import DATA_TYPES, TensorRTSession
from sdkd.core.profiles import Range
from sdkd.errors import OutOfMemoryError

PROFILES = ((4, 16), (2, 32))  # most latents, and their largest side
TYPES = {"float16": "<f2", "float32": "<f4"}


def view(address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor at an address of the GPU."""
    facts = {"shape": shape, "typestr": TYPES[dtype], "data": (address, False), "version": 3}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=facts), device="cuda")


class Context:
    """out = sample / 2 + timestep, by way of the activation memory."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.active_optimization_profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.views: dict[Any, torch.Tensor] = {}
        self.memory = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile, self.shapes = profile, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name], self.memory = shape, (0, 0)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        return self.engine.more + 2 * torch.Size(self.shapes["sample"]).numel()

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        shape, (address, size) = self.shapes["sample"], self.memory
        if size < self.update_device_memory_size_for_shapes():
            return False
        places = {"work": (address, shape, "float16"), "timestep": (self.addresses["timestep"], (), "float32")}
        places |= {name: (self.addresses[name], shape, "float16") for name in ("sample", "out_sample")}
        for place in places.values():
            if place not in self.views:
                self.views[place] = view(*place)
        work, timestep, sample, out = (self.views[places[name]] for name in places)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.mul(sample, 0.5, out=work)
            torch.add(work, timestep, out=out)
        return True


class Engine:
    """Two optimization profiles, no settings at run time."""

    num_optimization_profiles = len(PROFILES)
    more = 0  # bytes of activation memory that it wants besides

    def __init__(self, checked: Checked) -> None:
        self.inputs = [spec.name for spec in checked.contract.inputs]
        self.dtypes = {spec.name: spec.dtype for spec in (*checked.contract.inputs, *checked.contract.outputs)}
        self.num_io_tensors = len(self.dtypes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.dtypes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return DATA_TYPES[self.dtypes[name]]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def create_execution_context(self, strategy: str) -> Context:
        return Context(self)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    bundle = graph_unet(tmp_path_factory.mktemp("streams") / "bundle", "fp16", ("onnxruntime",))
    found = check_engine(bundle, "onnxruntime", "unet")
    profiles = Profiles(
        {"batch": Range(1, 1, batch), "height": Range(16, 16, side), "width": Range(16, 16, side),
         "sequence": Range.fixed(77)} for batch, side in PROFILES
    )  # fmt: skip
    return replace(found, record=replace(found.record, target="tensorrt"), profiles=profiles)


@pytest.fixture
def session(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = SimpleNamespace(
        __name__="stand-in",
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: Engine(checked)),
        IExecutionContext=Context,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours", STATIC="its own"),
        TensorIOMode=SimpleNamespace(INPUT="input"),
        TensorLocation=SimpleNamespace(DEVICE="device"),
        DataType=SimpleNamespace(**{name: name for name in DATA_TYPES.values()}),
    )
    monkeypatch.setattr(session_tensorrt, "require", lambda _: library)
    monkeypatch.setattr(session_tensorrt, "recorder", lambda _: SimpleNamespace(messages=[]))
    with TensorRTSession(checked) as opened:
        yield opened


def case(batch: int, side: int, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs on the GPU that differ from call to call, and what comes of them."""
    feeds = {name: tensor.cuda() for name, tensor in unet_feeds("fp16", batch, side).items()}
    feeds["timestep"].fill_(float(number))
    return feeds, feeds["sample"] * 0.5 + float(number)


def test_gpu_shapes_profiles_and_streams_in_turn(session: Any) -> None:
    sizes = [(batch, 16) for batch in (1, 2, 3, 4)] + [(batch, side) for batch in (1, 2) for side in (18, 24, 32)]
    assert len(sizes) > CAPACITY
    streams = [torch.cuda.Stream(), torch.cuda.default_stream(), torch.cuda.Stream()]
    kept = []
    for turn in range(4):
        for index, size in enumerate(sizes if turn % 2 else sizes[:3]):
            for number in range(3):  # plainly, with capture, by replay
                with torch.cuda.stream(streams[(turn + index) % 3]):
                    feeds, expected = case(*size, 10 * turn + number)
                    kept.append((session.run(feeds)["out_sample"], expected))
                    del feeds
                    torch.empty(1 << 18, device="cuda").fill_(float("nan"))  # what was freed too early is spoilt
    torch.cuda.synchronize()
    assert session._graphs.off == ""
    assert len(session._graphs) == CAPACITY
    assert all(graph._graph is not None for graph in session._graphs._entries.values())
    assert all(torch.equal(found, expected) for found, expected in kept)


def test_gpu_memory_that_runs_out_costs_one_call(session: Any) -> None:
    for number in range(3):
        feeds, expected = case(2, 16, number)
        assert torch.equal(session.run(feeds)["out_sample"], expected)
    large, expected = case(2, 32, 1)
    before = torch.cuda.memory_allocated()
    session._engine.more = 1 << 44
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match=r"run at batch 2, height 32, .*ran out of GPU memory"):
            session.run(large)
    assert torch.cuda.memory_allocated() <= before  # graphs that were there may have gone
    session._engine.more = 0
    session._main._shapes = {}  # asked for its memory again
    for _ in range(3):
        assert torch.equal(session.run(large)["out_sample"], expected)
