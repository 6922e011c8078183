"""Weights that change: a LoRA on engines, by refit and by rebuilding; a distillation step beside the reference's."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpu_bench.bench import Bench
from gpu_bench.bundles import built, copy_of, each_target, opened
from gpu_bench.settings import TEACHER
from gpu_bench.unets import Steps, answer, distance

if TYPE_CHECKING:
    import torch

    from sdkd.bundle.manifest import Bundle

TOUCHED = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)\.weight$")  # what a LoRA of attention changes
STRENGTH = 0.05  # of the change, in standard deviations of each weight


def changed_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """All attention weights of the UNet, changed a little, as a LoRA would."""
    import torch

    from sdkd.bundle.onnx_weights import TRANSFORMS_FILE, read_weights
    from sdkd.core.files import read_json

    file = bundle.path / bundle.component("unet").files[0].path
    names = [name for name in read_json(file.parent / TRANSFORMS_FILE) if TOUCHED.search(name)]
    generator, found = torch.Generator().manual_seed(0), {}
    for name, array in read_weights(file, names).items():
        weight = torch.tensor(array, dtype=torch.float32)
        found[name] = weight + STRENGTH * weight.std() * torch.randn(weight.shape, generator=generator)
    return found


def lora(bench: Bench) -> None:
    """Each target that runs here: an engine built for a LoRA's refit where there is such a thing, and a plain one."""
    weights: dict[str, torch.Tensor] = {}
    for target, bundle in each_target(bench):
        with bench.record.part(f"{target}, weights"):
            weights = weights or changed_weights(bundle)
            bench.record.fact(weights=len(weights))
        if not weights:
            return
        if target.startswith("tensorrt"):
            with bench.record.part(f"{target}, refit"):
                fitted = built(bench, copy_of(bundle, "refit"), target, "unet", refit="lora")
                change(bench, fitted, target, "refit", weights)
        with bench.record.part(f"{target}, rebuild"):
            change(bench, built(bench, bundle, target, "unet"), target, "rebuild", weights)


def change(bench: Bench, bundle: Bundle, target: str, way: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Time an engine's steps, its change of weights, its steps then, and the change back, which must be exact."""
    import torch

    from sdkd.workflow import rebuild

    steps, made, name = Steps(bench), bundle.engine(target, "unet"), f"{target}, {way}"
    with opened(bench, bundle, target, "unet") as unet:
        unet.session.rebuild = rebuild
        call = steps.call(unet)
        steps.rows(unet, f"{name}: before", steps.shapes[:1])
        before = answer(call)
        seconds = [bench.seconds(lambda: unet.session.swap(weights))]
        steps.rows(unet, f"{name}: LoRA", steps.shapes[:1])
        moved = distance(answer(call), before)
        seconds.append(bench.seconds(lambda: unet.session.swap({})))
        back = answer(call)
        bench.record.row(
            what="LoRA", way=name, seconds=seconds, moved=moved, exact_back=bool(torch.equal(back, before)),
            back=distance(back, before), builder_s=made.seconds, engine_bytes=made.total_bytes,
        )  # fmt: skip


def train(bench: Bench) -> None:
    """A student (the piece's model is its name) from the report's teacher at every batch, by tools/bench_train.py.

    A lack of memory costs one row.
    """
    from sdkd.models.resolve import load_eager

    pipe = load_eager(bench.settings.models[TEACHER])
    for batch in bench.settings.train_batches:
        with bench.record.part(f"batch {batch}"):
            training_rows(bench, pipe, batch)
        gc.collect()
        bench.wait()


def training_rows(bench: Bench, pipe: Any, batch: int) -> None:
    """The reference's step and ours at one batch."""
    import bench_train

    settings, student = bench.settings, bench.model
    size, precision = settings.train_size, settings.train_precision
    made = bench_train.Bench(student, size, batch, bench.device, precision, pipe=pipe)
    try:
        names = (bench_train.REFERENCE, "+ channels_last", bench_train.OURS)
        measured = bench_train.measure(made, settings.train_rounds, names)
        work = training_work(bench, pipe, made.trainer.unet, batch)
        for row in bench_train.result(student, measured, batch)["rows"]:
            figures = {key: row[key] for key in ("speedup", "speedup_low", "speedup_high", "memory_gb")}
            bench.record.row(
                what="training step", way=row["step"], batch=batch, size=size, precision=precision, student=student,
                median_s=row["seconds_median"], seconds=row["seconds_samples"], work=work, **figures,
            )  # fmt: skip
        bench.record.errors |= {f"batch {batch}, {name}": text for name, text in measured.failed.items()}
    finally:
        made.close()


def training_work(bench: Bench, pipe: Any, student: Any, batch: int) -> dict[str, int]:
    """FLOPs and least bytes of a step: the teacher forward, the student forward and twice as much backward."""
    from sdkd.compare.measure.limits import element_bytes, unet_work

    side, width = bench.settings.train_size // int(pipe.vae_scale_factor), element_bytes(bench.settings.train_precision)
    own, other = (
        dataclasses.asdict(unet_work(dict(unet.config), batch, side, side, element_bytes=width))
        for unet in (student, pipe.unet)
    )
    return {name: other[name] + 3 * own[name] for name in own}
