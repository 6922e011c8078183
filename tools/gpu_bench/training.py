"""A distillation step of the reference trainers against ours, by tools/bench_train.py: images per second and memory."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

from gpu_bench.device import Device
from gpu_bench.record import Record
from gpu_bench.settings import TEACHER, Settings


def train(settings: Settings, device: Device, record: Record, model: str) -> None:
    """A student (`model` is its name) from the report's teacher at every batch; a lack of memory costs one row."""
    from sdkd.models.resolve import load_eager

    pipe = load_eager(settings.models[TEACHER])
    for batch in settings.train_batches:
        with record.part(f"batch {batch}"):
            rows(settings, device, record, model, pipe, batch)
        gc.collect()
        device.wait()


def rows(settings: Settings, device: Device, record: Record, model: str, pipe: Any, batch: int) -> None:
    """The reference's step and ours at one batch."""
    import bench_train

    size, precision = settings.train_size, settings.train_precision
    bench = bench_train.Bench(model, size, batch, device.name, precision, pipe=pipe)
    try:
        names = (bench_train.REFERENCE, "+ channels_last", bench_train.OURS)
        measured = bench_train.measure(bench, settings.train_rounds, names)
        work = step_work(settings, pipe, bench.trainer.unet, batch)
        for row in bench_train.result(model, measured, batch)["rows"]:
            record.row(
                what="training step", way=row["step"], batch=batch, size=size, precision=precision, student=model,
                median_s=row["seconds_median"], seconds=row["seconds_samples"], work=work, speedup=row["speedup"],
                speedup_low=row["speedup_low"], speedup_high=row["speedup_high"], memory_gb=row["memory_gb"],
            )  # fmt: skip
        record.errors |= {f"batch {batch}, {name}": text for name, text in measured.failed.items()}
    finally:
        bench.close()


def step_work(settings: Settings, pipe: Any, student: Any, batch: int) -> dict[str, int]:
    """FLOPs and least bytes of a step: the teacher forward, the student forward and twice as much backward."""
    from sdkd.compare.measure.limits import element_bytes, unet_work

    scale = int(pipe.vae_scale_factor)
    side, width = settings.train_size // scale, element_bytes(settings.train_precision)
    own, other = (
        dataclasses.asdict(unet_work(dict(unet.config), batch, side, side, element_bytes=width))
        for unet in (student, pipe.unet)
    )
    return {name: other[name] + 3 * own[name] for name in own}
