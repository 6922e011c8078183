"""UNet steps: eagerly, compiled, and on engines, with the same inputs and against the same float32 answer."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_bench.bench import QUEUED, Bench, Work
from gpu_bench.bundles import built, exported, graphs_of, opened, refused
from gpu_bench.settings import KINDS
from sdkd.errors import EngineError
from sdkd.targets.registry import installed_version, require

if TYPE_CHECKING:
    import torch

    from engines.sessions.base import EngineSession

EAGER = "eager, channels_last"
TOKENS = 77
TIMESTEP = 500.0


def scale_of(model: str) -> int:
    """Pixels per latent of a model's VAE, from its config."""
    from sdkd.models.resolve import resolve

    return resolve(model).latent_scale


def step(unet: Any, feeds: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """One call as a pipeline makes it."""
    sample, timestep, states = (feeds[name] for name in ("sample", "timestep", "encoder_hidden_states"))
    return lambda: unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]


def work_of(bench: Bench, config: Any, batch: int, size: int) -> dict[str, int]:
    """FLOPs and least bytes of one call, for the limit."""
    from sdkd.compare.measure.limits import element_bytes, unet_work

    side, width = size // scale_of(bench.name), element_bytes(bench.settings.precision)
    return dataclasses.asdict(unet_work(dict(config), batch, side, side, TOKENS, width))


def answer(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a call gives, in float32 on the CPU."""
    import torch

    with torch.inference_mode():
        return call().float().cpu()


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative distance, ||x - truth|| / ||truth||."""
    return float((found - truth).norm() / truth.norm())


def parity(bench: Bench, way: str, component: str, call: Callable[[], torch.Tensor], truth: torch.Tensor) -> None:
    """A row of three calls' relative distance to float32; an engine makes them plainly, captured and replayed."""
    errors = [distance(answer(call), truth) for _ in range(3)]
    bench.record.row(what="parity", way=way, component=component, errors=errors, precision=bench.settings.precision)


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


class Steps:
    """Times a UNet at all shapes of a report, and says how far its answer is from float32's."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.shapes = bench, bench.settings.shapes
        self._feeds: dict[tuple[int, int, torch.dtype], dict[str, torch.Tensor]] = {}

    def call(self, unet: Any, shape: tuple[int, int] | None = None) -> Callable[[], torch.Tensor]:
        """A UNet's call at a shape (the first by default), in its own dtype."""
        return step(unet, self.feeds(unet.config, shape or self.shapes[0], getattr(unet, "dtype", self.bench.dtype)))

    def feeds(self, config: Any, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Latents [batch, channels, side, side], timestep [], states [batch, 77, context]: the same for every UNet.

        Made once. Never in inference mode: a compiled UNet would be compiled again for the other kind.
        """
        import torch

        if (key := (*shape, dtype)) not in self._feeds:
            batch, side = shape[0], shape[1] // scale_of(self.bench.name)
            generator = torch.Generator().manual_seed(batch * side)
            with torch.inference_mode(False):
                made = {
                    "sample": torch.randn(batch, config["in_channels"], side, side, generator=generator),
                    "encoder_hidden_states": torch.randn(
                        batch, TOKENS, config["cross_attention_dim"], generator=generator
                    ),
                }
                placed = {name: tensor.to(self.bench.device, dtype) for name, tensor in made.items()}
                self._feeds[key] = {**placed, "timestep": torch.tensor(TIMESTEP, device=self.bench.device)}
        return self._feeds[key]

    def rows(self, unet: Any, way: str, shapes: Sequence[tuple[int, int]] | None = None, **facts: Any) -> None:
        """One row per shape; a shape that fails is an error of its own."""
        for shape in self.shapes if shapes is None else shapes:
            with self.bench.record.part(f"{way}, batch {shape[0]}, {shape[1]} px"):
                work = work_of(self.bench, unet.config, *shape)
                self.bench.row(self.call(unet, shape), "UNet step", way, *shape, work=work, **facts)

    def rest(self, unet: Any, way: str) -> None:
        """At the first shape: calls that nothing waits between, and the relative distance to float32."""
        with self.bench.record.part(f"{way}, queued"):
            self.bench.row(self.call(unet), "queued", way, *self.shapes[0], queued=QUEUED)
        with self.bench.record.part(f"{way}, parity"):
            self.parity(unet, way)

    def parity(self, unet: Any, way: str) -> None:
        """The relative distance to eager float32, whose answer is made once for a model and kept in the work folder."""
        import torch

        file = Path(self.bench.settings.work, f"truth-{self.bench.model}.pt")
        if not file.is_file():
            from sdkd.models.resolve import load_component

            self.make_truth(load_component(self.bench.name, "unet").to(self.bench.device))
        parity(self.bench, way, "unet", self.call(unet), torch.load(file, weights_only=True))

    def make_truth(self, unet: Any) -> None:
        """Keep the answer of a UNet in float32 on the device."""
        import torch

        with exact_float32():
            found = answer(self.call(unet))
        Path(self.bench.settings.work).mkdir(parents=True, exist_ok=True)
        torch.save(found, Path(self.bench.settings.work, f"truth-{self.bench.model}.pt"))


def eager(bench: Bench) -> None:
    """PyTorch as it is: SDPA, first in torch's own layout at one shape, then channels-last at all."""
    import torch

    from sdkd.compare.measure.environment import attention_kernel
    from sdkd.models.resolve import load_component

    steps = Steps(bench)
    unet = load_component(bench.name, "unet").to(bench.device)
    bench.record.fact(parameters=sum(one.numel() for one in unet.parameters()))
    with bench.record.part("float32"):
        steps.make_truth(unet)
    unet = torch.nn.Module.to(unet, dtype=bench.dtype)
    bench.wait()
    steps.rows(unet, "eager", steps.shapes[:1])
    unet = unet.to(memory_format=torch.channels_last)
    with bench.record.part("attention"), torch.no_grad():
        bench.record.fact(attention=attention_kernel(steps.call(unet)))
    steps.rows(unet, EAGER)
    steps.rest(unet, EAGER)


def compiled(bench: Bench) -> None:
    """torch.compile with each of the settings' options at the first shape, then with the first at the others.

    `compile_s` of a way is what its first call takes. Shapes that time is short for are left out, and named.
    """
    import torch

    from sdkd.models.resolve import load_component

    steps, record = Steps(bench), bench.record
    unet = load_component(bench.name, "unet", bench.dtype).to(bench.device).to(memory_format=torch.channels_last)
    options, (first, *others) = bench.settings.compile_options, steps.shapes
    longest = 0.0
    calls = [*((first, one) for one in options), *((other, options[0]) for other in others)]
    for index, (shape, one) in enumerate(calls):
        way = "compile, " + ", ".join(map(str, one.values()))
        where = f"{way}, batch {shape[0]}, {shape[1]} px"
        if index >= len(options) and record.spent_s + 1.5 * longest > KINDS["compile"].cap:
            record.fact(left_out=[f"batch {batch}, {size} px" for batch, size in others[index - len(options) :]])
            break
        with record.part(where):
            torch._dynamo.reset()
            fast: Any = torch.compile(unet, dynamic=False, **one)
            with torch.inference_mode():
                spent = bench.seconds(steps.call(fast, shape))
            longest = max(longest, spent)
            record.fact(compile_s={**record.facts.get("compile_s", {}), where: spent})
            steps.rows(fast, way, [shape], first_call_s=spent)
            if shape == first:
                steps.parity(fast, way)


def engine(bench: Bench) -> None:
    """A target's engine: exported, built, opened, with CUDA graphs and without; the bare library beside the runtime."""
    from engines.sessions.opening import expected_device

    steps, record, target = Steps(bench), bench.record, bench.kind
    with record.part("export"):
        require(target)
        if why := refused(bench.settings, target):  # nothing is exported or built for it
            raise EngineError(why)
        if target == "onnxruntime" and expected_device(target).type != bench.device:
            raise EngineError(f"ONNX Runtime has no CUDA here, and its CPU is not asked: {installed_version(target)}")
        bundle = exported(bench)
    if "export" in record.errors:
        return
    with record.part("build"):
        start = time.perf_counter()
        bundle = built(bench, bundle, target, "unet")
        made = bundle.engine(target, "unet")
        record.fact(
            build_s=time.perf_counter() - start, builder_s=made.seconds, engine_bytes=made.total_bytes,
            flags=dict(made.flags), built_for=list(made.built_for),
        )  # fmt: skip
    for way, graphs in graphs_of(target).items() if "build" not in record.errors else ():
        options = {} if graphs else {"cuda_graphs": False}
        with record.part(way), opened(bench, bundle, target, "unet", **options) as unet:
            run_engine(steps, unet, way, bare=graphs and target.startswith("tensorrt"))


def run_engine(steps: Steps, unet: Any, way: str, bare: bool) -> None:
    """Rows of one way to run an engine: first call, all shapes, parity, and for TensorRT the library's bare call."""
    import torch

    load_s = steps.bench.load_s
    with torch.inference_mode():
        first = steps.bench.seconds(steps.call(unet))
    steps.rows(unet, way, load_s=load_s, first_call_s=first)
    steps.rest(unet, way)
    if bare:
        with steps.bench.record.part(f"{steps.bench.kind}, bare"):
            bare_rows(steps, unet.session)


def bare_rows(steps: Steps, session: EngineSession) -> None:
    """The library's own call on bound memory, and the replay of its CUDA graph: what the runtime adds is the rest.

    Streams and graphs are torch.cuda's, as they are part of the library's own call; Bench times it as all others.
    """
    import torch

    from engines.sessions.ranges import check_sizes
    from engines.sessions.trt.context import Call
    from engines.sessions.trt.cuda_graphs import ShapeGraph

    bench, shape = steps.bench, steps.shapes[0]
    trt_session: Any = session
    config = session.checked.bundle.config("unet")
    dtype = {spec.name: getattr(torch, spec.dtype) for spec in session.contract.inputs}
    feeds = {k: t.to(dtype[k]).contiguous() for k, t in steps.feeds(config, shape, bench.dtype).items()}
    outputs = session.run(feeds)
    shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
    profile = check_sizes(session.checked, trt_session._sizes(feeds))
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
            bench.row(call, "bare", f"{bench.kind}, {name}", *shape, work=work_of(bench, config, *shape))
    graph.close()
