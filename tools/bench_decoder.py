"""A full VAE's decoder and a small one of TAESD's shape: seconds of an image of each, paired, samples kept.

    python tools/bench_decoder.py                                  # eager, onnxruntime, openvino, openvino-bf16
    python tools/bench_decoder.py --pieces openvino-bf16 --rounds 9

One decoded image of --size pixels, batch 1, in rounds over both decoders; every piece in a process of its own. By
default the VAE of Stable Diffusion 1.5 and TAESD's, both with random weights: speed alone. How near images of a small
decoder are is measured where it was trained: benchmarks/demo-decoder, by tools/train_demo_decoder.py. Writes
benchmarks/<machine>/decoder.json and .md. Run it on a quiet machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_kit.record import Record
from bench_kit.results import ROOT, check_known, command_of, faster, head, in_turn, keep, machine, parse, ratio_cell
from bench_kit.runner import Piece, Place, python_path, run_or_exit

from sdkd.core.console import markdown_table
from sdkd.targets.registry import cpu_precisions

SLOTS = {"eager": "fp32", "onnxruntime": "fp32", "openvino": "fp32", "openvino-bf16": "bf16"}
FULL, SMALL = "full", "small"
WARM_UP = 2


def pieces() -> list[str]:
    """Ways that this CPU has units for."""
    return [name for name, kind in SLOTS.items() if kind in cpu_precisions() | {"fp32"}]


def decoders(slot: str, work: str, size: int, model: str, vae: str) -> dict[str, Callable[[], object]]:
    """Calls that decode one image, by decoder; engines are built where missing."""
    import torch

    from engines.sessions.opening import open_session
    from export.build.engines import build_engine
    from export.pipeline import export_pipeline
    from sdkd.core.contract import torch_dtype
    from sdkd.core.files import write_json
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.models.replacements import short_vae, with_vae
    from sdkd.models.resolve import load_component, resolve
    from sdkd.targets.plan import plan_for_model

    found: dict[str, Callable[[], object]] = {}
    for name, source in ((FULL, resolve(model)), (SMALL, with_vae(resolve(model), vae))):
        side = size // source.latent_scale
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
        if slot == "eager":
            module = load_component(source, "vae")
            found[name] = lambda module=module, latents=latents: module.decode(latents)
            continue
        plan, ranges = plan_for_model(slot, SLOTS[slot]), ShapeRanges(*(Range.fixed(n) for n in (1, size, size, 77)))
        bundle = Path(work, f"{model}-{short_vae(vae) if name == SMALL else FULL}-{plan.onnx}".replace(":", "-"))
        if not (bundle / "bundle.json").is_file():
            export_pipeline(source, bundle, precision=plan.onnx, components=["vae_decoder"])
            write_json(bundle / "unet" / "config.json", source.unet_config)  # builds ask it what sizes there are
        build_engine(bundle, plan.target.name, precision=plan.precision, ranges=ranges)
        session = open_session(bundle, plan.slot, "vae_decoder")
        feed = latents.to(torch_dtype(plan.onnx))
        found[name] = lambda session=session, feed=feed: session.run({"latent_sample": feed})
    return found


def measure(record: Record, slot: str, rounds: int, work: str, size: int, model: str, vae: str) -> None:
    """One way: seconds of each decoder, one call a round."""
    import torch

    calls = decoders(slot, work, size, model, vae)
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        for _, name in in_turn(list(calls), rounds):
            start = time.perf_counter()
            calls[name]()
            samples[name].append([time.perf_counter() - start])
    medians = {name: statistics.median(one for (one,) in found) for name, found in samples.items()}
    record.row(
        way=slot, precision=SLOTS[slot], full_seconds=medians[FULL], small_seconds=medians[SMALL],
        faster=faster(samples[FULL], samples[SMALL]), samples=samples,
    )  # fmt: skip


def page(found: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    asked = found["settings"]
    cells = [
        [row["way"], f"{row['full_seconds']:.2f}", f"{row['small_seconds']:.3f}", ratio_cell(row["faster"])]
        for row in rows
    ]
    return [
        "# Decoders",
        "",
        f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}.",
        "",
        f"One image of {asked['size']} px: the VAE of `{asked['model']}` and `{asked['vae']}`.",
        "",
        *markdown_table(("way", "full, s", "small, s", "faster"), cells),
        "",
        "Medians; ratios with a 95 % bootstrap interval over paired rounds.",
    ]


def main() -> None:
    """Measure and write."""
    here = pieces()
    asked = parse(
        __doc__, pieces=",".join(here), rounds=5, size=512, model="random:sd15", vae="random:taesd",
        work=ROOT / "artifacts" / "bench-decoder",
    )  # fmt: skip
    names = asked.pieces.split(",")
    check_known("piece", names, here)
    settings = {name: getattr(asked, name) for name in ("size", "model", "vae")}
    place, given = Place(asked.work, python_path(), logged=False), {"rounds": asked.rounds, "work": str(asked.work)}
    rows = [
        row
        for name in names
        for row in run_or_exit(Piece(name, "bench_decoder:measure", {"slot": name, **given, **settings}), place)["rows"]
    ]
    command = command_of("bench_decoder.py", asked, "pieces", "rounds", "size", "model", "vae")
    found = {**head(command, settings=settings), "rows": rows}
    keep(asked.output / machine() / "decoder.json", found, page(found))


if __name__ == "__main__":
    main()
