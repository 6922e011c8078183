"""A distillation step of the reference trainers against ours: same models, batch, machine and moment.

    python tools/bench_train.py                            # SD 1.5 -> tiny and small, random weights, 256 pixels
    python tools/bench_train.py --students tiny --size 512 --batch-size 8 --device cuda

The reference is the step of Segmind's distill_training.py as it runs today: VAE and text encoder in every step, the
teacher in float32 under autocast, a feature loss in the autocast dtype, AdamW without fused kernels; captions are
token ids before it begins, and gradients are let go at its end, both as there. Each further row
adds one measure; the last rows are `Trainer.step` itself, eager and compiled. One step of each row a round, in
rotating order, so that drift of the machine hits all alike. Writes
benchmarks/<machine>/train-<size>-<students>.json (raw samples) and .md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_kit.results import NONE, command_of, faster, head, in_turn, keep, machine, parse, ratio_cell
from torch.nn import functional as F

from sdkd.compare.measure.stats import Spread
from sdkd.compare.measure.timing import Timer
from sdkd.core.console import markdown_table
from sdkd.distill.data.encode import STATES, tokens
from sdkd.distill.data.latents import encode_images
from sdkd.distill.training.batches import Batch
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.loop import peak_memory
from sdkd.distill.training.losses import FeatureUNet, task_target
from sdkd.distill.training.pairs import feature_pairs
from sdkd.distill.training.setup import lay_out_state
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError
from sdkd.models.resolve import load_eager
from sdkd.students.blocks import build_student

CAPTIONS = ("a lighthouse in a storm", "a bowl of oranges", "an old bicycle", "two cats on a wall")


@dataclass(frozen=True)
class Measures:
    """What a step does better than the reference."""

    cache: bool = False  # latents and text embeddings made before
    half_teacher: bool = False  # teacher's weights in the precision of the forward passes
    fused: bool = False  # one kernel for the whole optimizer step
    channels_last: bool = False


REFERENCE = "reference"
ROWS: dict[str, Measures] = {
    REFERENCE: Measures(),
    "+ cached latents and text": Measures(cache=True),
    "+ teacher in half precision": Measures(cache=True, half_teacher=True),
    "+ fused AdamW": Measures(cache=True, half_teacher=True, fused=True),
    "+ channels_last": Measures(cache=True, half_teacher=True, fused=True, channels_last=True),
}
OURS = "Trainer.step"
COMPILED = "Trainer.step, torch.compile"


class Bench:
    """Models of one student, and a step for each row; all rows train the same student with the same optimizer.

    `pipe`: the teacher's pipeline, SD 1.5's shapes with random weights when there is none.
    """

    def __init__(self, student: str, size: int, batch_size: int, device: str, precision: str, pipe: Any = None) -> None:
        self.config = TrainConfig(
            student=student, batch_size=batch_size, device=device, precision=precision, steps=10_000, resolution=size
        )
        self.pipe = pipe or load_eager("random:sd15")
        images = [{"image": _picture(index, size), "caption": CAPTIONS[index % 4]} for index in range(2 * batch_size)]
        self.pipe.vae.to(device)  # it encodes there
        latents = encode_images(self.pipe.vae, images, size=size)
        self.trainer = Trainer(self.pipe, build_student(self.pipe.unet, student), latents, self.config)
        self.device, self.dtype = self.trainer.device, self.trainer.dtype
        if self.pipe.vae is not self.trainer.vae:  # the trainer's copy is the one in use
            self.pipe.vae.to("cpu")
        names = [name for name, _ in feature_pairs(self.config.spec, self.config.pair_preset)]
        self.pipe.unet.to(self.device)
        self.teachers = {False: FeatureUNet(self.pipe.unet, names), True: self.trainer.teacher}
        self.optimizer = self.trainer.optimizer.optimizer
        calls = (self.trainer.model, self.trainer.teacher_call)
        self.calls = {OURS: calls, COMPILED: tuple(torch.compile(call) for call in calls)}
        self.pixels = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(batch_size)]
        self.ids = tokens(self.pipe.tokenizer, captions, self.pipe.tokenizer.model_max_length).to(self.device)

    def _run(self, measures: Measures, teacher: FeatureUNet) -> None:
        trainer = self.trainer
        batch = trainer.batches.next()
        if not measures.cache:
            batch = self._encoded(batch)
        noisy = trainer.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        half = self.dtype != torch.float32  # in float32 there is nothing to cast to
        cast = torch.autocast(self.device.type, self.dtype, enabled=half and not measures.half_teacher)
        with torch.no_grad(), cast:
            given = noisy.to(self.dtype) if measures.half_teacher else noisy
            taught = teacher(given, batch.timesteps, **batch.given)
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            learnt = trainer.student(noisy, batch.timesteps, **batch.given)
        target = task_target(trainer.scheduler, batch.latents, batch.noise, batch.timesteps)
        weights = self.config.weights
        feature = torch.stack([F.mse_loss(own, other) for own, other in zip(learnt[1], taught[1], strict=True)]).sum()
        loss = weights.task * F.mse_loss(learnt[0].float(), target)
        loss = loss + weights.output * F.mse_loss(learnt[0].float(), taught[0].float()) + weights.feature * feature
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _encoded(self, batch: Batch) -> Batch:
        """The reference's VAE encoder and text encoder, in the precision of the forward passes."""
        trainer = self.trainer
        with torch.no_grad():
            latents = trainer.vae.encode(self.pixels.to(self.dtype)).latent_dist.sample()
            text: torch.Tensor = trainer.text.encoders[0](self.ids)[0]
        scaled = latents.float() * trainer.vae.config.scaling_factor
        return Batch(scaled, batch.noise, batch.timesteps, {STATES: text}, batch.matching)

    def parked(self, row: str) -> int:
        """Bytes of the teacher that a row does not use, and that lies on the device all the same."""
        other = self.teachers[not self._measures(row).half_teacher].unet
        if other is self.teachers[self._measures(row).half_teacher].unet:
            return 0
        return sum(one.numel() * one.element_size() for one in other.parameters())

    def close(self) -> None:
        """Take the hooks off the models, and the pipeline's UNet off the device."""
        self.trainer.close()
        self.teachers[False].close()
        self.pipe.unet.to("cpu")

    def _measures(self, row: str) -> Measures:
        return ROWS.get(row, ROWS["+ fused AdamW"])

    def prepare(self, row: str) -> Callable[[], Any]:
        """Whatever a row needs outside its timing; returns the work to time."""
        chosen = self._measures(row)
        teacher: Any = self.teachers[chosen.half_teacher]
        layout = torch.channels_last if chosen.channels_last else torch.contiguous_format
        for unet in (self.trainer.unet, teacher.unet):
            unet.to(memory_format=layout)
        self.optimizer.zero_grad(set_to_none=True)
        self._fit_optimizer(chosen.fused)
        if row in ROWS:
            return lambda: self._run(chosen, teacher)
        self.trainer.model, self.trainer.teacher_call = self.calls[row]
        return self._own

    def _own(self) -> None:
        self.trainer.step()
        self.optimizer.zero_grad(set_to_none=True)  # the next step's beginning, so that a timing holds one of it

    def _fit_optimizer(self, fused: bool) -> None:
        """One optimizer for all rows: its state as the row's kernels want it, in the parameters' present layout."""
        self.optimizer.param_groups[0].update(fused=fused, foreach=not fused)
        lay_out_state(self.optimizer.state)
        for parameter, values in self.optimizer.state.items():  # only fused kernels count on the device
            values["step"] = values["step"].to(parameter.device if fused else "cpu")


def _picture(index: int, size: int) -> Any:
    from PIL import Image

    generator = torch.Generator().manual_seed(index)
    noise = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(noise).resize((size, size))


@dataclass
class Measured:
    """By row: seconds of every step after a first round, peak memory in GB, why it failed; seconds to compile."""

    samples: dict[str, list[float]]
    memory: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0


def measure(bench: Bench, rounds: int, rows: Sequence[str] = ()) -> Measured:
    """Some rows, or all, in rounds; one without enough memory says so, and the others go on without it.

    Memory is that of a row alone: the teacher that another row uses does not count.
    """
    found = Measured({name: [] for name in rows or (*ROWS, *bench.calls)})
    for turn, name in in_turn(list(found.samples), rounds + 1):
        if name in found.failed:
            continue
        try:
            seconds = _one(bench, name, found)
        except torch.OutOfMemoryError as error:
            found.failed[name] = str(error).splitlines()[0]
            del found.samples[name]
            continue
        if turn:
            found.samples[name].append(seconds)
        elif name == COMPILED:
            found.compile_seconds = seconds
        print(f"round {turn} of {rounds}, {name}: {seconds:.2f} s", flush=True)
    return found


def _one(bench: Bench, name: str, found: Measured) -> float:
    """Seconds of one step, and its peak where the device counts one: a process's would be that of all rows."""
    work, counts = bench.prepare(name), bench.device.type == "cuda"
    gc.collect()
    if counts:
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = Timer(str(bench.device)).time(work).wall_s
    if counts:
        found.memory[name] = (peak_memory(bench.device) - bench.parked(name)) / 1e9
    return seconds


def result(student: str, measured: Measured, batch_size: int) -> dict[str, Any]:
    """Images per second and the speed over the reference, with a bootstrap interval of paired rounds.

    None for the speed where the reference did not run. InputError for fewer than three rounds.
    """
    rows = []
    base = measured.samples.get(REFERENCE)
    for name, values in measured.samples.items():
        over = faster([[value] for value in base], [[value] for value in values]) if base else None
        if base and over is None:
            raise InputError(f"{len(values)} rounds say nothing about drift: give --rounds 3 or more")
        middle = Spread.of([values]).median
        speed = dict(zip(("speedup", "speedup_low", "speedup_high"), over or (None,) * 3, strict=True))
        rows.append({
            "step": name, "seconds_median": middle, "images_per_second": batch_size / middle, **speed,
            "memory_gb": measured.memory.get(name), "seconds_samples": values,
        })  # fmt: skip
    return {"student": student, "rows": rows, "failed": measured.failed}


def page(found: dict[str, Any]) -> list[str]:
    """The table for people."""
    lines = [
        f"# Distillation step, SD 1.5 shapes with random weights, {found['size']} px, batch {found['batch_size']}",
        "",
        f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}; forward passes in "
        f"{found['precision']}.",
    ]
    for part in found["students"]:
        rows = [
            [row["step"], f"{row['seconds_median']:.2f}", f"{row['images_per_second']:.3f}",
             ratio_cell([row[key] for key in ("speedup", "speedup_low", "speedup_high")])]
            for row in part["rows"]
        ]  # fmt: skip
        rows += [[name, NONE, NONE, why] for name, why in part.get("failed", {}).items()]
        heads = ("step", "s", "images/s", "over reference (95 % interval)")
        lines += ["", f"## Student {part['student']}", "", *markdown_table(heads, rows)]
    return [
        *lines,
        "",
        f"Rows are cumulative up to `{OURS}`, the trainer itself; `{COMPILED}` is the same with `--compile`, whose",
        f"first step took {found['students'][0]['compile_seconds']:.0f} s.",
    ]


def main() -> None:
    """Parse, measure, write."""
    names = ("students", "size", "batch_size", "rounds", "device", "precision")
    asked = parse(__doc__, **dict(zip(names, ("tiny,small", 256, 2, 6, "cpu", "bf16"), strict=True)))
    parts = []
    for student in asked.students.split(","):
        bench = Bench(student, asked.size, asked.batch_size, asked.device, asked.precision)
        measured = measure(bench, asked.rounds)
        parts.append(result(student, measured, asked.batch_size) | {"compile_seconds": measured.compile_seconds})
        del bench
        gc.collect()
    settings = {name: getattr(asked, name) for name in ("size", "batch_size", "precision")}
    found = head(command_of("bench_train.py", asked, *names), asked.device, **settings, students=parts)
    keep(asked.output / machine() / f"train-{asked.size}-{asked.students.replace(',', '-')}.json", found, page(found))


if __name__ == "__main__":
    main()
