"""What runs the pieces of a report, each in a process of its own: with a record, the settings, and what is its own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_kit.comparison import keep_comparison
from bench_kit.overhead import measure_overhead, overhead_row
from bench_kit.record import Record

from gpu_bench.settings import IN_TORCH, INDUCTOR, TEACHER, TENSORRT, Settings
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, EngineError

if TYPE_CHECKING:
    import torch

    from engines.sessions.base import EngineSession
    from export.build.options import BuildOptions
    from sdkd.targets.gpu_trial import Trial

COMPONENTS = ("unet", "text_encoder", "vae_decoder")
PROMPT = "a lighthouse in a storm"
TOKENS = 77
TOUCHED = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)\.weight$")  # what a LoRA of attention changes
STRENGTH = 0.05  # of the change, in standard deviations of each weight


def doctor(record: Record, given: Mapping[str, Any]) -> None:
    """First of all whether each TensorRT kind builds, opens and runs a small engine here; then all of doctor."""
    from sdkd.commands.doctor import examine, try_target

    trials = []
    for target in [one for one in TENSORRT if one in Settings.from_json(given).targets]:
        with record.part(target):
            trials += [dataclasses.asdict(trial) for trial in try_target(target)]
            record.fact(trials=trials)
    with record.part("doctor"):
        record.fact(doctor=examine())


# Engines: made by the product, once, in bundles of the work folder that all pieces share


def folder_of(settings: Settings, label: str) -> Path:
    """A model's bundle."""
    return Path(settings.work, f"{label}-{settings.precision}")


def exported(settings: Settings, label: str) -> Bundle:
    """A model's bundle; exported where it is missing, not checked: a comparison does that on the device."""
    with contextlib.suppress(BundleError):
        bundle = Bundle.open(folder_of(settings, label))
        for name in COMPONENTS:
            bundle.component(name)
        return bundle
    from export import export_pipeline

    others = [folder_of(settings, other) for other in settings.models if other != label]
    return export_pipeline(
        settings.models[label], folder_of(settings, label), precision=settings.precision, components=COMPONENTS,
        verify=False, overwrite=True, reuse=others,
    )  # fmt: skip


def profiles(settings: Settings, component: str) -> tuple[ShapeRanges, ...]:
    """Of the UNet one for the first batch and size alone, and one for all of them, best at the largest batch.

    Text encoder and VAE are built for one image of any of the sizes.
    """
    first = Range.fixed(settings.sizes[0])
    sides, tokens = Range(min(settings.sizes), settings.sizes[0], max(settings.sizes)), Range.fixed(TOKENS)
    if component != "unet":
        return (ShapeRanges(Range.fixed(1), sides, sides, tokens),)
    most = max(settings.batches)
    alone = ShapeRanges(Range.fixed(settings.batches[0]), first, first, tokens)
    return alone, ShapeRanges(Range(min(settings.batches), most, most), sides, sides, tokens)


def built(settings: Settings, label: str, target: str, *components: str, **options: Any) -> Bundle:
    """A model's bundle with engines of a target, of all components by default, built where they are missing.

    `options` as of BuildOptions.
    """
    from export import build_engine

    how, bundle = build_options(settings, target, **options), exported(settings, label)
    names = components or tuple(bundle.manifest.components)
    for some in ([name for name in names if name == "unet"], [name for name in names if name != "unet"]):
        if some:
            ranges = profiles(settings, some[0])
            if target == INDUCTOR:  # minutes for each profile, where kernels are timed: of the UNet at one size alone
                ranges = ranges[:1]
                how = how if some == ["unet"] else dataclasses.replace(how, optimization_level=0)
            bundle = build_engine(
                bundle, target, precision=settings.precision, ranges=ranges, components=some, options=how
            )
    return bundle


def build_options(settings: Settings, target: str, **options: Any) -> BuildOptions:
    """How engines of a target are built here: for this GPU alone where no other plan ran, or can be refitted."""
    from export.build.options import CURRENT, BuildOptions
    from sdkd.targets.gpu_trial import PORTABLE
    from sdkd.targets.registry import TARGETS

    ran = [trial.plan for trial in trials(settings, target) if trial.ran]
    alone = "refit" in options or (ran and PORTABLE not in ran)
    if alone and target in TENSORRT and not TARGETS[target].builds_on_gpu:
        options = {"compute_capabilities": (CURRENT,), **options}
    return BuildOptions(**options)


def trials(settings: Settings, target: str) -> Sequence[Trial]:
    """What plans of a TensorRT kind did on this GPU, tried before or now; empty for others, and for a dry run."""
    if settings.device != "cuda" or target not in TENSORRT:
        return ()
    from sdkd.commands.doctor import try_target
    from sdkd.targets.gpu_trial import remembered

    return remembered(target) or try_target(target)


def refused(settings: Settings, target: str) -> str:
    """Why engines of a target are not even built here; empty where they can be built, and run on the device."""
    from engines.sessions.opening import expected_device
    from sdkd.targets.registry import availability

    here = availability(target)
    if not (here.can_build and here.can_run):
        return f"{here.reason}; {here.fix}"
    if (place := expected_device(target).type) != settings.device:
        return f"it runs on {place} here, and the report is of {settings.device}: see what `sdkd doctor` says of it"
    found = trials(settings, target)
    return "" if not found or any(trial.ran for trial in found) else "; ".join(trial.words() for trial in found)


def each_engine(record: Record, settings: Settings, measure: Callable[[str], None]) -> None:
    """Measure every engine target, each a part; one that cannot run here is an error in words."""
    for target in settings.engines:
        with record.part(target):
            if why := refused(settings, target):
                raise EngineError(why)
            measure(target)


# Comparisons


def comparison(
    record: Record, given: Mapping[str, Any], subjects: Mapping[str, Sequence[str]], size: int, batch: int
) -> None:
    """Models by label on their targets, side by side: their engines first, then `sdkd.compare`."""
    from sdkd.compare import Subject, compare
    from sdkd.core.console import progress

    settings, ready, notes, spent = Settings.from_json(given), list[Subject](), list[str](), dict[str, float]()
    for label, target in [(label, target) for label, targets in subjects.items() for target in targets]:
        role = "model" if len(subjects) == 1 else TEACHER if label == TEACHER else "student"
        model, precision, folder = settings.models[label], settings.precision, folder_of(settings, label)
        half = f"-{precision}" if target in IN_TORCH and precision != "fp32" else ""
        row = Subject(f"{label} {target}{half}", model, target, precision, folder, role)
        if target in IN_TORCH:
            ready.append(dataclasses.replace(row, bundle=None))
        elif why := refused(settings, target):
            notes.append(f"{row.label} was left out: {why}")
        else:
            with record.part(row.label):
                start = time.perf_counter()
                built(settings, label, target)
                ready.append(row)
                spent[row.label] = time.perf_counter() - start
                record.fact(seconds_to_build=spent)
    with progress(", ".join(subjects)) as shown:
        report = compare(
            ready, prompts=[PROMPT], steps=settings.steps, size=size, batch=batch, runs=settings.runs,
            min_seconds=settings.seconds, image_runs=3, device=settings.device, isolate=settings.device == "cuda",
            notes=notes, progress=shown,
        )  # fmt: skip
    keep_comparison(record, report, [folder for label in subjects if (folder := folder_of(settings, label)).is_dir()])


def overhead(record: Record, given: Mapping[str, Any], model: str) -> None:
    """What the runtime adds to each library's own call."""
    settings = Settings.from_json(given)
    call = {"num_inference_steps": settings.steps, "height": settings.sizes[0], "width": settings.sizes[0]}

    def measure(target: str) -> None:
        bundle = built(settings, model, target)
        record.row(**overhead_row(model, target, measure_overhead(bundle.path, target, 2, call)))

    each_engine(record, settings, measure)


# Weights that change


def changed_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """All attention weights of the UNet, changed a little, as a LoRA would."""
    import torch

    from sdkd.bundle.onnx_weights import torch_weights, weight_names

    file = bundle.path / bundle.component("unet").files[0].path
    names = sorted(name for name in weight_names(file) if TOUCHED.search(name))
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in torch_weights(file, names).items():
        weight = weight.float()
        found[name] = weight + STRENGTH * weight.std() * torch.randn(weight.shape, generator=generator)
    return found


def lora(record: Record, given: Mapping[str, Any], model: str) -> None:
    """Each target that runs here: a plain engine, and one built for a LoRA's refit where there is such a thing."""
    from engines import open_session

    settings, weights = Settings.from_json(given), dict[str, Any]()

    def measure(target: str) -> None:
        ways: dict[str, dict[str, str]] = {
            "in place" if target == INDUCTOR else "rebuild": {},
            **({"refit": {"refit": "lora"}} if target in TENSORRT else {}),
        }
        for way, options in ways.items():
            bundle = built(settings, model, target, "unet", **options)
            weights.update(weights or changed_weights(bundle))
            with record.part(f"{target}, {way}"), open_session(bundle, target, "unet") as session:
                record.row(
                    what="LoRA", way=f"{target}, {way}", weights=len(weights), **change(settings, session, weights)
                )

    each_engine(record, settings, measure)


def change(settings: Settings, session: EngineSession, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Seconds to give an engine other weights and to take them off again, which must be exact."""
    import torch

    from sdkd.compare.measure.timing import Timer
    from sdkd.workflow import rebuild

    session.rebuild = rebuild
    side = settings.sizes[0] // session.checked.scale
    sizes = {"batch": 2 * settings.batches[0], "height": side, "width": side, "sequence": TOKENS}
    generator, timer = torch.Generator().manual_seed(0), Timer(settings.device)
    feeds = {
        spec.name: torch.rand(spec.shape(sizes), generator=generator).to(settings.device, spec.torch_dtype)
        for spec in session.contract.inputs
    }

    def answer() -> torch.Tensor:
        runs = [session.run(feeds)["out_sample"] for _ in range(3)]  # plain, captured, replayed
        return runs[-1].float().cpu()

    def distance(found: torch.Tensor) -> float:
        return float((found - before).norm() / before.norm())

    before = answer()
    on_s = timer.time(lambda: session.swap(weights)).wall_s
    moved = distance(answer())
    off_s = timer.time(lambda: session.swap({})).wall_s
    back = answer()
    exact = bool(torch.equal(back, before))
    return {"on_s": on_s, "off_s": off_s, "moved": moved, "exact_back": exact, "back": distance(back)}


def train(record: Record, given: Mapping[str, Any], student: str) -> None:
    """A distillation step of the reference and ours at every batch, on the teacher's pipeline."""
    from sdkd.compare.measure.limits import measure_ceilings
    from sdkd.models.resolve import load_eager

    settings = Settings.from_json(given)
    pipe = load_eager(settings.models[TEACHER])
    ceilings = measure_ceilings(settings.device, settings.train_precision)
    record.fact(ceilings=dataclasses.asdict(ceilings))
    for batch in settings.train_batches:
        with record.part(f"batch {batch}"):
            training_rows(record, settings, pipe, student, batch, ceilings)
        gc.collect()
        if settings.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def training_rows(record: Record, settings: Settings, pipe: Any, student: str, batch: int, ceilings: Any) -> None:
    """The reference's step and ours at one batch, and how much of the machine's limit each reaches."""
    import bench_train

    from sdkd.compare.measure.limits import fraction

    size, precision = settings.train_size, settings.train_precision
    made = bench_train.Bench(student, size, batch, settings.device, precision, pipe=pipe)
    try:
        names = (bench_train.REFERENCE, "+ channels_last", bench_train.OURS)
        measured = bench_train.measure(made, settings.train_rounds, names)
        work = training_work(settings, pipe, made.trainer.unet, batch)
        for row in bench_train.result(student, measured, batch)["rows"]:
            limit = dataclasses.asdict(fraction(work, ceilings, row["seconds_median"]))
            record.row(
                what="training step", way=row.pop("step"), batch=batch, size=size, precision=precision,
                student=student, work=dataclasses.asdict(work), limit=limit, **row,
            )  # fmt: skip
        record.errors |= {f"batch {batch}, {name}": text for name, text in measured.failed.items()}
    finally:
        made.close()


def training_work(settings: Settings, pipe: Any, student: Any, batch: int) -> Any:
    """FLOPs and least bytes of a step: the teacher forward, the student forward and twice as much backward."""
    from sdkd.compare.measure.limits import Work, element_bytes, unet_work

    side, width = settings.train_size // int(pipe.vae_scale_factor), element_bytes(settings.train_precision)
    own, other = (unet_work(dict(unet.config), batch, side, side, element_bytes=width) for unet in (student, pipe.unet))
    return Work(other.flops + 3 * own.flops, other.bytes + 3 * own.bytes)
