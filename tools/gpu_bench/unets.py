"""UNet steps: eagerly, compiled, and on engines, with the same inputs and against the same float32 answer."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_bench.bundles import build_facts, built, check_place, exported, refused, unet_profiles
from gpu_bench.device import Device, Work, sampled
from gpu_bench.record import Record
from gpu_bench.settings import Settings, cap
from sdkd.errors import EngineError
from sdkd.targets.registry import installed_version, require

if TYPE_CHECKING:
    import torch

    from engines.sessions.base import EngineSession

TOKENS = 77
TIMESTEP = 500.0


def scale_of(model: str) -> int:
    """Pixels per latent of a model's VAE, from its config."""
    from sdkd.core.contract import vae_scale
    from sdkd.core.files import read_json
    from sdkd.models.families import FAMILIES
    from sdkd.models.random_weights import parse
    from sdkd.models.resolve import resolve

    path = resolve(model).path
    return vae_scale(FAMILIES[parse(model).family].vae if path is None else read_json(path / "vae" / "config.json"))


def inputs(config: Any, batch: int, side: int, device: Device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same latents [batch, channels, side, side], timestep [] and states [batch, 77, context] for every way."""
    import torch

    generator = torch.Generator().manual_seed(batch * side)
    sample = torch.randn(batch, config["in_channels"], side, side, generator=generator)
    states = torch.randn(batch, TOKENS, config["cross_attention_dim"], generator=generator)
    placed = {"sample": sample, "encoder_hidden_states": states}
    found = {name: tensor.to(device.name, dtype) for name, tensor in placed.items()}
    return {**found, "timestep": torch.tensor(TIMESTEP, device=device.name)}


def step(unet: Any, feeds: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """One call as a pipeline makes it."""
    sample, timestep, states = (feeds[name] for name in ("sample", "timestep", "encoder_hidden_states"))
    return lambda: unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]


def work_of(settings: Settings, config: Any, batch: int, side: int) -> dict[str, int]:
    """FLOPs and least bytes of one call, for the limit."""
    from sdkd.compare.measure.limits import element_bytes, unet_work

    return dataclasses.asdict(unet_work(dict(config), batch, side, side, TOKENS, element_bytes(settings.precision)))


def answer(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a call gives, in float32 on the CPU."""
    import torch

    with torch.inference_mode():
        return call().float().cpu()


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative distance, ||x - truth|| / ||truth||."""
    return float((found - truth).norm() / truth.norm())


def distances(call: Callable[[], torch.Tensor], truth: torch.Tensor) -> list[float]:
    """Of three calls, which an engine makes plainly, captured and replayed."""
    return [distance(answer(call), truth) for _ in range(3)]


class Steps:
    """Times a UNet at all shapes of a report, and says how far its answer is from float32's."""

    def __init__(self, settings: Settings, device: Device, record: Record, model: str) -> None:
        self.settings, self.device, self.record, self.model = settings, device, record, model
        self.scale = scale_of(settings.models[model])
        self._feeds: dict[tuple[int, int, torch.dtype], dict[str, torch.Tensor]] = {}

    def feeds(self, config: Any, batch: int, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs of a shape, made once.

        Never in inference mode: a compiled UNet would be compiled again for the other kind.
        """
        import torch

        key = (batch, size, dtype)
        if key not in self._feeds:
            with torch.inference_mode(False):
                self._feeds[key] = inputs(config, batch, size // self.scale, self.device, dtype)
        return self._feeds[key]

    def rows(self, unet: Any, way: str, shapes: list[tuple[int, int]] | None = None, **facts: Any) -> None:
        """One row per shape; a shape that fails is an error of its own."""
        dtype = getattr(unet, "dtype", self.device.dtype)
        for batch, size in self.settings.shapes if shapes is None else shapes:
            with self.record.part(f"{way}, batch {batch}, {size} px"):
                work = step(unet, self.feeds(unet.config, batch, size, dtype))
                self.device.wait()  # what torch keeps in store of a larger shape is not taken by this one
                self.device.reset_peak()
                samples = self.device.samples(work)
                counted = work_of(self.settings, unet.config, batch, size // self.scale)
                self.record.row(
                    **sampled(samples, what="UNet step", way=way, batch=batch, size=size, **facts),
                    precision=self.settings.precision, work=counted, **self.device.memory(),
                )  # fmt: skip

    def queued(self, unet: Any, way: str) -> None:
        """One row: calls at the first shape that nothing waits between, so that what a call costs the CPU is hidden."""
        work = step(unet, self.first(unet.config, getattr(unet, "dtype", self.device.dtype)))
        batch, size = self.settings.shapes[0]
        self.record.row(**sampled(self.device.queued(work), what="queued", way=way, batch=batch, size=size))

    def parity(self, unet: Any, way: str) -> None:
        """The relative distance to float32 at the first shape."""
        feeds = self.first(unet.config, getattr(unet, "dtype", self.device.dtype))
        errors = distances(step(unet, feeds), self.truth())
        self.record.row(what="parity", way=way, component="unet", errors=errors, precision=self.settings.precision)

    def first(self, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Inputs of the first shape."""
        return self.feeds(config, *self.settings.shapes[0], dtype)

    def truth(self) -> torch.Tensor:
        """Eager float32's answer at the first shape, made once for each model and kept in the work folder."""
        import torch

        file = Path(self.settings.work, f"truth-{self.model}.pt")
        if file.is_file():
            return torch.load(file, weights_only=True)
        from sdkd.models.resolve import load_component

        unet = load_component(self.settings.models[self.model], "unet").to(self.device.name)
        return self.make_truth(unet)

    def make_truth(self, unet: Any) -> torch.Tensor:
        """`truth`, by a UNet in float32 on the device."""
        import torch

        file = Path(self.settings.work, f"truth-{self.model}.pt")
        with exact_float32():
            found = answer(step(unet, self.first(unet.config, torch.float32)))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
        return found


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and products in float32 itself, not in TF32."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def eager(settings: Settings, device: Device, record: Record, model: str) -> None:
    """PyTorch as it is: SDPA, first in torch's own layout at one shape, then channels-last at all."""
    import torch

    from sdkd.compare.measure.environment import attention_kernel
    from sdkd.models.resolve import load_component

    steps = Steps(settings, device, record, model)
    unet = load_component(settings.models[model], "unet").to(device.name)
    record.fact(parameters=sum(one.numel() for one in unet.parameters()))
    with record.part("float32"):
        steps.make_truth(unet)
    unet = torch.nn.Module.to(unet, dtype=device.dtype)
    device.wait()
    steps.rows(unet, "eager", settings.shapes[:1])
    unet = unet.to(memory_format=torch.channels_last)
    with record.part("attention"), torch.no_grad():
        record.fact(attention=attention_kernel(step(unet, steps.first(unet.config, device.dtype))))
    steps.rows(unet, "eager, channels_last")
    with record.part("queued"):
        steps.queued(unet, "eager, channels_last")
    with record.part("parity"):
        steps.parity(unet, "eager, channels_last")


def compiled(settings: Settings, device: Device, record: Record, model: str) -> None:
    """torch.compile with each of the settings' options at the first shape, then with the first at the others.

    `compile_s` of a way is what its first call takes. Shapes that time is short for are left out, and named.
    """
    import torch

    from sdkd.models.resolve import load_component

    steps = Steps(settings, device, record, model)
    unet = load_component(settings.models[model], "unet", device.dtype).to(device.name)
    unet = unet.to(memory_format=torch.channels_last)
    options, (first, *others) = settings.compile_options, settings.shapes
    longest = 0.0
    calls = [*((first, one) for one in options), *((other, options[0]) for other in others)]
    for index, (shape, one) in enumerate(calls):
        way = "compile, " + ", ".join(map(str, one.values()))
        if index >= len(options) and record.spent_s + 1.5 * longest > cap("compile"):
            record.fact(left_out=[f"batch {batch}, {size} px" for batch, size in others[index - len(options) :]])
            break
        with record.part(f"{way}, batch {shape[0]}, {shape[1]} px"):
            torch._dynamo.reset()
            fast: Any = torch.compile(unet, dynamic=False, **one)
            with torch.inference_mode():
                spent = device.seconds(step(fast, steps.feeds(unet.config, *shape, device.dtype)))
            longest = max(longest, spent)
            facts = {f"{way}, batch {shape[0]}, {shape[1]} px": spent}
            record.fact(compile_s={**record.facts.get("compile_s", {}), **facts})
            steps.rows(fast, way, [shape], first_call_s=spent)
            if shape == first:
                steps.parity(fast, way)


def engine(settings: Settings, device: Device, record: Record, model: str, target: str) -> None:
    """A target's engine: exported, built, opened, with CUDA graphs and without; the bare library beside the runtime."""
    from engines.sessions.opening import expected_device

    steps = Steps(settings, device, record, model)
    with record.part("export"):
        require(target)
        if why := refused(settings, target):  # nothing is exported or built for it
            raise EngineError(why)
        if target == "onnxruntime" and expected_device(target).type != device.name:
            raise EngineError(f"ONNX Runtime has no CUDA here, and its CPU is not asked: {installed_version(target)}")
        bundle = exported(settings, model, record)
    if "export" in record.errors:
        return
    with record.part("build"):
        start = time.perf_counter()
        bundle = built(settings, bundle, target, ("unet",), unet_profiles(settings))
        made = bundle.engine(target, "unet")
        record.fact(
            build_s=time.perf_counter() - start, builder_s=made.seconds, engine_bytes=made.total_bytes,
            flags=dict(made.flags), built_for=list(made.built_for),
        )  # fmt: skip
        build_facts(record, bundle, target, ("unet",))
    if "build" in record.errors:
        return
    ways: dict[str, dict[str, Any]] = {target: {}}
    if target.startswith("tensorrt"):
        ways = {f"{target}, CUDA graphs": {}, f"{target}, no graphs": {"cuda_graphs": False}}
    for way, options in ways.items():
        with record.part(way):
            run_engine(steps, bundle, target, way, options)


def run_engine(steps: Steps, bundle: Any, target: str, way: str, options: dict[str, Any]) -> None:
    """Rows of one way to run an engine: first call, all shapes, parity, and for TensorRT the library's bare call."""
    import torch

    from engines.pipelines.pipeline import build_module
    from engines.sessions.opening import open_session

    steps.device.begin()
    opened = partial(open_session, bundle, target, **options)
    start = time.perf_counter()
    unet: Any = build_module(bundle, target, "unet", steps.device.dtype, torch.device(steps.device.name), None, opened)
    load_s = time.perf_counter() - start
    try:
        check_place(unet.sessions(), steps.device)
        with torch.inference_mode():
            first = steps.device.seconds(step(unet, steps.first(unet.config, unet.dtype)))
        steps.rows(unet, way, load_s=load_s, first_call_s=first)
        with steps.record.part(f"{way}, queued"):
            steps.queued(unet, way)
        steps.parity(unet, way)
        if target.startswith("tensorrt") and not options:
            with steps.record.part(f"{target}, bare"):
                bare_rows(steps, unet.session, target)
    finally:
        unet.close()
        steps.device.wait()


def bare_rows(steps: Steps, session: EngineSession, target: str) -> None:
    """The library's own call on bound memory, and the replay of its CUDA graph: what the runtime adds is the rest.

    Streams and graphs are torch.cuda's, as they are part of the library's own call; Device times it as all others.
    """
    import torch

    from engines.sessions.trt.context import Call, pick_profile
    from engines.sessions.trt.cuda_graphs import ShapeGraph

    batch, size = steps.settings.shapes[0]
    trt_session: Any = session
    config = session.checked.bundle.config("unet")
    dtype = {spec.name: getattr(torch, spec.dtype) for spec in session.contract.inputs}
    feeds = {k: t.to(dtype[k]).contiguous() for k, t in steps.first(config, steps.device.dtype).items()}
    outputs = session.run(feeds)
    shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
    counted = work_of(steps.settings, config, batch, size // steps.scale)
    profile = pick_profile(trt_session._spans, shapes)
    assert profile is not None
    graph: ShapeGraph = trt_session._make_graph(Call(feeds, outputs, profile, shapes))
    side = trt_session._side
    with torch.cuda.stream(side):
        graph.buffers.fill(feeds)
        for _ in range(3):
            graph._enqueue(side.cuda_stream)  # type: ignore[misc]
        side.synchronize()
        calls: dict[str, Work] = {"bare call": lambda: graph._enqueue(side.cuda_stream)}  # type: ignore[misc]
        if trt_session._native:  # the call itself is a replay, by the library
            calls = {"bare replay": calls["bare call"]}
        else:
            graph.capture(side)
            calls["bare replay"] = graph._graph.replay  # type: ignore[union-attr]
        for name, call in calls.items():
            row = sampled(steps.device.samples(call), what="bare", way=f"{target}, {name}", batch=batch, size=size)
            steps.record.row(**row, precision=steps.settings.precision, work=counted)
    graph.close()
