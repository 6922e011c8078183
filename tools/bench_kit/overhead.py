"""What the runtime adds to the library's own call: both on the same tensors, in the denoising steps of a pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdkd.core.console import markdown_table
from sdkd.errors import EngineError


def bare_call(session: Any, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], object]:
    """What the target's library itself does for these tensors, everything bound now; they must outlive the call.

    On a GPU, TensorRT's and Inductor's is the replay of the CUDA graph that the session captured for their shapes;
    EngineError without one.
    """
    if hasattr(session, "_graphs"):
        return _replay(session, feeds)
    if hasattr(session, "_package"):
        from engines.sessions.ranges import signature

        inputs = [feeds[spec.name] for spec in session.contract.inputs]
        return partial(session._package.run, session._fit(signature(feeds)).profile, inputs)
    if hasattr(session, "_models"):
        _, request = session._models.of({name: tensor.shape for name, tensor in feeds.items()})
        session._bind(request, feeds)  # which knows what it gave
        for name, tensor in outputs.items():
            request.set_tensor(name, session._shared(tensor))
        found: Callable[[], object] = request.infer
        return found
    from engines.sessions.onnxruntime_session import ELEMENT

    binding, place = session._session.io_binding(), (session.device.type, session.device.index or 0)
    for tensors, bind in ((feeds, binding.bind_input), (outputs, binding.bind_output)):
        for name, tensor in tensors.items():
            bind(name, *place, ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    return partial(session._session.run_with_iobinding, binding)


def _replay(session: Any, feeds: Mapping[str, Any]) -> Callable[[], object]:
    import torch

    from engines.sessions.cuda_graphs import graph_key
    from engines.sessions.ranges import signature

    profile = session._fit(signature(feeds)).profile
    graph = session._graphs.find(graph_key(profile, {name: tuple(tensor.shape) for name, tensor in feeds.items()}))
    if graph is None:
        raise EngineError(f"{session.checked.label} has no CUDA graph for these shapes: {session._graphs.off}")

    def replay() -> None:
        with torch.cuda.stream(session._side):
            if graph._graph is None:  # the library captures and replays by itself
                graph._enqueue(session._side.cuda_stream)
            else:
                graph._graph.replay()

    return replay


class Steps:
    """Stands for a pipeline's UNet: runs it, and the library's bare call on the same tensors before or after."""

    def __init__(self, unet: Any) -> None:
        from sdkd.compare.measure.timing import Timer

        self.unet, self.forward = unet, unet.forward
        self.timer = Timer(str(unet.session.device))
        self.samples: dict[str, list[float]] = {"bare": [], "runtime": [], "loop": []}
        self.turn = 0
        self.ended = 0.0  # when the last step's calls were done; 0 at the beginning of an image
        vars(unet)["forward"] = self  # an engine module refuses a patched forward pass by its name

    def __call__(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        """Run the UNet as the pipeline asks; what it answers is the runtime's own answer."""
        import torch

        from engines.modules.base import cast_feeds

        started, session = self.timer.clock(), self.unet.session
        tensors = {
            "sample": sample,
            "timestep": torch.tensor(float(timestep)),
            "encoder_hidden_states": encoder_hidden_states,
        }
        cast = cast_feeds(session, tensors)
        feeds = {name: tensor.to(session.device).contiguous() for name, tensor in cast.items()}
        outputs = {"out_sample": torch.empty_like(feeds["sample"])}
        answers: list[Any] = []
        runtime = partial(self.forward, sample, timestep, encoder_hidden_states, **options)
        spent = {}
        for name in sorted(("bare", "runtime"), reverse=bool(self.turn % 2)):
            # Bound anew each time: the runtime's own call leaves the library with memory that is free by now.
            bare = bare_call(session, feeds, outputs) if name == "bare" else None
            spent[name] = self.timer.time(bare or (lambda: answers.append(runtime()))).wall_s
        if self.ended:  # the first step of an image follows on the text encoder
            for name, seconds in {**spent, "loop": started - self.ended}.items():
                self.samples[name].append(seconds)
        self.turn += 1
        self.ended = self.timer.clock()
        return answers[0]


def measure_overhead(bundle: Path, slot: str, images: int, call: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of each denoising step's bare call, EngineUNet, and the rest: guidance, scheduler, diffusers' loop."""
    from engines import load_pipeline

    pipe: Any = load_pipeline(bundle, slot)
    pipe.set_progress_bar_config(disable=True)
    warm = 1 if pipe.unet.session.device.type == "cpu" else 3  # a CUDA graph is captured in the second
    pipe("warm up", output_type="latent", **{**call, "num_inference_steps": warm})
    steps = Steps(pipe.unet)
    for _ in range(images):
        steps.ended = 0.0
        pipe("a lighthouse in a storm", output_type="latent", **call)
    pipe.unet.close()
    return steps.samples


def overhead_row(model: str, slot: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians; the runtime's overhead and the whole step's as medians of pairs' differences, with 95 % intervals."""
    bare = statistics.median(samples["bare"])
    runtime = [r - b for r, b in zip(samples["runtime"], samples["bare"], strict=True)]
    whole = [own + loop for own, loop in zip(runtime, samples["loop"], strict=True)]
    return {
        "model": model, "slot": slot, "bare_seconds": bare,
        "runtime_seconds": statistics.median(samples["runtime"]), "loop_seconds": statistics.median(samples["loop"]),
        "overhead_seconds": interval(runtime), "step_overhead_seconds": interval(whole),
        "overhead_share": [value / bare for value in interval(runtime)],
        "step_overhead_share": [value / bare for value in interval(whole)], "samples": dict(samples),
    }  # fmt: skip


def interval(values: Sequence[float]) -> list[float]:
    """Median and its 95 % interval from the binomial's order statistics (normal approximation)."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = max(0, int(len(ordered) / 2 - reach)), min(len(ordered) - 1, int(len(ordered) / 2 + reach))
    return [statistics.median(ordered), ordered[low], ordered[high]]


def overhead_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows in words."""
    cells = [
        [row["model"], row["slot"], f"{row['bare_seconds'] * 1e3:,.2f}", f"{row['runtime_seconds'] * 1e3:,.2f}",
         "{:.3f} ({:.3f} to {:.3f})".format(*(value * 1e3 for value in row["overhead_seconds"])),
         f"{row['overhead_share'][0]:.2%}", f"{row['loop_seconds'] * 1e3:.2f}",
         f"{row['step_overhead_share'][0]:.2%}"]
        for row in rows
    ]  # fmt: skip
    heads = ("model", "target", "bare, ms", "EngineUNet, ms", "overhead, ms (95 %)", "share", "loop, ms",
             "whole step's share")  # fmt: skip
    return [
        "## Denoising steps in a pipeline, with guidance: the library's bare call on the same tensors, and the rest",
        "",
        *markdown_table(heads, cells, left=2),
        "",
        "Overhead: median of the differences of pairs. Loop: guidance, scheduler and diffusers' own Python between two",
        "UNet calls. Share: of the bare call; the whole step's adds the loop. Bare in TensorRT: a CUDA graph's replay.",
    ]
