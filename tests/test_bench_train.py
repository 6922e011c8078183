"""tools/bench_train.py: what its rows are, beside one another on one optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_pipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bench_train

from sdkd.distill.data.encode import STATES

BATCH = 3


@pytest.fixture
def bench() -> Iterator[bench_train.Bench]:
    made = bench_train.Bench("tiny", 64, BATCH, "cpu", "bf16", pipe=tiny_pipeline())
    yield made
    made.close()


def test_a_steps_memory_leaves_out_the_teacher_of_the_other_steps() -> None:
    pipe = tiny_pipeline()
    count = sum(parameter.numel() for parameter in pipe.unet.parameters())
    bench = bench_train.Bench("tiny", 64, 2, "cpu", "bf16", pipe=pipe)
    try:
        assert bench.parked("reference") == 2 * count  # the half-precision one lies there for the others
        assert bench.parked("+ teacher in half precision") == bench.parked(bench_train.OURS) == 4 * count
    finally:
        bench.close()
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_the_optimizers_state_fits_the_kernels_of_every_row(bench: bench_train.Bench) -> None:
    """Fused AdamW walks parameter and state side by side in memory, and plain AdamW counts its steps on the CPU."""
    for row in [*bench_train.ROWS, bench_train.OURS, bench_train.REFERENCE]:
        bench.prepare(row)()
        bench.prepare(row)
        assert len(bench.optimizer.state) == len(bench.trainer.parameters)
        for parameter, state in bench.optimizer.state.items():
            assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()
            assert state["step"].device.type == "cpu"
        kernels = [parameter for parameter in bench.trainer.parameters if parameter.dim() == 4]
        wanted = bench._measures(row).channels_last
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in kernels if wanted)
    step = next(iter(bench.optimizer.state.values()))["step"]
    assert step == len(bench_train.ROWS) + 2


def test_the_reference_encodes_its_batch_alone_and_once(bench: bench_train.Bench) -> None:
    """As the trainers do: token ids of exactly the batch, in one call."""
    drawn = bench.trainer.batches.next()
    seen: list[torch.Size] = []
    hook = bench.trainer.text.encoders[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    batch = bench._encoded(drawn)
    hook.remove()
    length = bench.pipe.tokenizer.model_max_length
    assert seen == [torch.Size((BATCH, length))]
    text = batch.given[STATES]
    assert text.shape == (BATCH, length, bench.pipe.text_encoder.config.hidden_size)
    with torch.no_grad():
        alone = bench.trainer.text.encoders[0](bench.ids[1:2])[0]
    torch.testing.assert_close(text[1:2], alone)


@pytest.mark.parametrize("row", [bench_train.REFERENCE, bench_train.OURS])
def test_no_gradients_are_alive_when_a_step_begins(bench: bench_train.Bench, row: str) -> None:
    work = bench.prepare(row)
    assert all(parameter.grad is None for parameter in bench.trainer.parameters)
    before = bench.trainer.unet.conv_in.weight.detach().clone()
    work()
    assert all(parameter.grad is None for parameter in bench.trainer.parameters)
    assert not torch.equal(bench.trainer.unet.conv_in.weight, before)


def test_a_row_without_memory_says_so_and_the_others_go_on(
    bench: bench_train.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = bench.prepare

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    def refusing(row: str) -> Callable[[], Any]:
        return too_large if row == bench_train.REFERENCE else prepare(row)

    monkeypatch.setattr(bench, "prepare", refusing)
    measured = bench_train.measure(bench, 3, (bench_train.REFERENCE, bench_train.OURS))
    assert measured.failed == {bench_train.REFERENCE: "CUDA out of memory. Tried to allocate 2.00 GiB."}
    assert {name: len(values) for name, values in measured.samples.items()} == {bench_train.OURS: 3}
    assert measured.memory == {}
    found = bench_train.result("tiny", measured, BATCH)
    (row,) = found["rows"]
    assert (row["step"], row["speedup"], row["memory_gb"]) == (bench_train.OURS, None, None)
    assert row["images_per_second"] == BATCH / row["seconds_median"]
    head = {"size": 64, "batch_size": BATCH, "machine": "a", "date": "2026-01-02", "commit": "abc", "command": "c"}
    made = {**head, "precision": "bf16", "students": [{**found, "compile_seconds": 0.0}]}
    page = "\n".join(bench_train.page(made))
    assert f"| {bench_train.OURS} | {row['seconds_median']:.2f} | {row['images_per_second']:.3f} | – |" in page
    assert "| reference | – | – | CUDA out of memory. Tried to allocate 2.00 GiB. |" in page
