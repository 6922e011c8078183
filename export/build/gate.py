"""The gate of engines of eight bits: the float graph, whole images, and the seconds of half precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.build.job import Built, Job, Run
from export.build.parity import compare, seeded_inputs
from sdkd.bundle.manifest import Bundle
from sdkd.core.conditions import flat
from sdkd.core.console import Progress

if TYPE_CHECKING:
    import numpy as np

    from sdkd.quantization.calibration import Calibration, Call

Floats = Callable[[Job, Path], Built]
"""Builds a job's engine in its target's half precision, which it notes in the flags, into a folder."""
OTHER = ".other"  # that folder, beside an engine while it is built
FASTER = 1.05  # times the half precision of the same target, or it does not pay
ROUNDS, SECONDS = (3, 5, 50), (2.0, 30.0)  # of the timing: least, usual and most turns; least and most time
SHOWN_IMAGES = 2  # whole images that the engine is held against


def prediction_rows(job: Job, run: Run, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """`compare` of an engine's noise prediction with the float graph's, of each recorded call."""
    from export.build.onnxruntime_graph import open_reference

    reference, feeds = open_reference(job.onnx), [call_feeds(job, call) for call in calls]
    return [compare(run(one)[0], reference(one)[0]) for one in feeds]


def call_feeds(job: Job, call: Call) -> dict[str, np.ndarray]:
    """A recorded call as the engine takes it, at the shape that it is best at: repeated, or cut at the right and below.

    Latents stay as they were drawn; tokens are those that the engine takes.
    """
    import numpy as np

    arrays = {
        "sample": call.sample,
        "encoder_hidden_states": call.text,
        "timestep": np.array(call.timestep),
        **call.extra,
    }

    def fitted(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        array = arrays[name]
        times = [-(-size // own) for size, own in zip(shape, array.shape, strict=True)]
        whole = np.tile(array, times) if times else array
        return np.ascontiguousarray(whole[tuple(slice(size) for size in shape)], dtype=dtype).reshape(shape)

    sizes = job.checks[0]
    return {spec.name: fitted(spec.name, spec.dtype, spec.shape(sizes)) for spec in job.contract.inputs}


def image_psnr(job: Job, run: Run, calibration: Calibration) -> list[float] | None:
    """PSNR in dB of whole images that are drawn with the engine, against those of the calibration, both decoded.

    None where the calibration's images have a size that the engine does not take.
    """
    import numpy as np
    import torch

    from sdkd.models.bundle_modules import pipeline_of
    from sdkd.quantization.recording import draw

    sizes = {"height": calibration.images.shape[2], "width": calibration.images.shape[3]}
    if not any(_takes(profile, sizes) for profile in job.profiles):
        return None
    pipe = pipeline_of(Bundle.open(job.bundle))
    pipe.unet.forward = _Forward(job, run)
    found = []
    with torch.inference_mode():
        for number in range(min(SHOWN_IMAGES, len(calibration.images))):
            latents = draw(pipe, calibration.about, number), calibration.images[number : number + 1]
            images = [_decoded(pipe.vae, torch.from_numpy(one)) for one in latents]
            error = float(np.mean((images[0] - images[1]) ** 2))
            found.append(round(float(10 * np.log10(4 / max(error, 1e-10))), 2))  # from -1 to 1
    return found


def _takes(profile: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether a profile holds two guided latents of this size, or one."""
    low, _, high = profile["sample"]
    return all(low[at] <= sizes[axis] <= high[at] for at, axis in ((2, "height"), (3, "width")))


def _decoded(vae: Any, latents: Any) -> np.ndarray:
    image = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    found: np.ndarray = image.clamp(-1, 1).numpy()
    return found


class _Forward:
    """An engine in the place of a UNet's forward pass, in pieces of the batch that it takes."""

    def __init__(self, job: Job, run: Run) -> None:
        self._run, self._specs = run, job.contract.inputs
        self._most = max(profile["sample"][2][0] for profile in job.profiles)

    def __call__(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, *, return_dict: bool = True, **conditions: Any
    ) -> Any:  # fmt: skip
        import torch

        given = {"sample": sample, "encoder_hidden_states": encoder_hidden_states, **flat(conditions)}
        arrays = {spec.name: given[spec.name].float().numpy() for spec in self._specs if spec.name != "timestep"}
        parts = [self._part(arrays, timestep, piece) for piece in self._pieces(len(sample))]
        return (torch.from_numpy(_joined(parts)),)

    def _pieces(self, count: int) -> Iterator[slice]:
        return (slice(first, first + self._most) for first in range(0, count, self._most))

    def _part(self, arrays: Mapping[str, np.ndarray], timestep: Any, piece: slice) -> np.ndarray:
        import numpy as np

        feeds = {
            spec.name: np.array(float(timestep), spec.dtype)
            if spec.name == "timestep"
            else np.ascontiguousarray(arrays[spec.name][piece], dtype=spec.dtype)
            for spec in self._specs
        }
        found: np.ndarray = self._run(feeds)[0].astype(np.float32)
        return found


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    import numpy as np

    return np.concatenate(parts)


# Whether it pays


def speed(job: Job, run: Run, floats: Floats, progress: Progress) -> dict[str, Any] | None:
    """An engine's seconds beside those of the target's half precision, in turns; `times` is the median of the turns.

    None where the other cannot be run here.
    """
    progress(f"building {job.target} in half precision, to time it", 0.0)
    other = floats(job, Path(job.folder) / OTHER)
    if other.run is None:
        return None
    feeds, runs = seeded_inputs(job, job.checks[0]), {job.precision: run, other.flags["precision"]: other.run}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for one in runs.values():
        one(feeds)
    progress("timing both in turns", 0.6)
    start = time.perf_counter()
    for turn in range(1, ROUNDS[2] + 1):
        for name, one in runs.items():
            seconds[name].append(_seconds(one, feeds))
        spent = time.perf_counter() - start
        if (turn >= ROUNDS[1] and spent > SECONDS[0]) or (turn >= ROUNDS[0] and spent > SECONDS[1]):
            break
    own, half = seconds.values()
    times = statistics.median(b / a for a, b in zip(own, half, strict=True))
    return {"against": other.flags["precision"], "times": round(times, 3), "seconds": seconds}


def _seconds(run: Run, feeds: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    run(feeds)
    return time.perf_counter() - start


def pays(found: Mapping[str, Any]) -> bool:
    """Whether an engine is faster than half precision, or was not timed: it is in half precision, or runs elsewhere."""
    measured = found.get("speed")
    return measured is None or measured["times"] >= FASTER
