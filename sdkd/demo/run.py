"""`sdkd demo`: teacher -> students -> ONNX -> engines -> images -> comparison, with the embedded teacher."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.console import Progress, quiet, within
from sdkd.core.files import check_file_free, check_free, new_folder, read_json, write_json
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.demo.picture import PICTURE, draw
from sdkd.errors import InputError
from sdkd.targets.plan import EnginePlan, plan_for_model
from sdkd.targets.registry import availability, cpu_precisions

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from sdkd.compare.measure.results import Report
    from sdkd.compare.measure.subjects import Subject
    from sdkd.distill import TrainConfig
    from sdkd.distill.data.latents import LatentCache
    from sdkd.models.resolve import Model
    from sdkd.workflow import Prepared

STUDENTS = ("small", "tiny")
MODELS = ("teacher", *STUDENTS)
FEW, FEW_FROM = "tiny-4-steps", "tiny"  # and the student that it was before
RECORD = "demo.json"  # beside a result: what it was made from, so that a second run can re-use it
PROMPTS = (
    "a large red star on a white background",
    "a large yellow heart on a blue background",
    "a medium green circle on a black background",
    "a large blue cross on a yellow background",
    "a medium magenta ring on a green background",
    "a large cyan triangle on a red background",
)
# (target, precision of the engine) in the order of the report; each is built where it can be and run where it can be.
ENGINES = (
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("tensorrt-rtx", "fp16"),
    ("tensorrt", "fp16"),
)
# Shares of the whole time, for the time left.
SHARES = {"students": (0.0, 0.5), "engines": (0.5, 0.67), "few steps": (0.67, 0.7), "comparison": (0.7, 1.0)}


@dataclass(frozen=True)
class DemoSettings:
    """What a demo run does; every field is part of what makes a re-used result fresh."""

    distill_steps: int = 240
    consistency_steps: int = 300
    consistency_feature_weight: float = 0.01  # better at 4 and 8 steps: benchmarks/ablation-few-steps
    batch_size: int = 32
    learning_rate: float = 1e-3  # far from the 1e-5..1e-4 of full-size students: so few steps must do
    images: int = 1536
    sampling_steps: int = 25
    guidance_scale: float = 4.0
    seed: int = 0
    runs: int = 15
    prompts: tuple[str, ...] = PROMPTS


@dataclass
class DemoResult:
    """Where everything is, what was re-used and what could not be done here."""

    folder: Path
    report: Report | None = None
    reused: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # target -> why


def run_demo(folder: Path, settings: DemoSettings | None = None, progress: Progress = quiet) -> DemoResult:
    """The whole way into `folder`; re-uses what is fresh. Raises what any step raises, losing nothing finished.

    Every subject is measured in a process of its own: a script that calls this needs `if __name__ == "__main__":`.
    """
    from sdkd.compare.measure.environment import load_average

    check_outputs(folder)
    load, settings = load_average(), settings or DemoSettings()
    folder.mkdir(parents=True, exist_ok=True)
    result = DemoResult(folder)
    make_students(folder, settings, result, within(progress, *SHARES["students"]))
    engines = wanted_engines(result.skipped)
    subjects = make_engines(folder, engines, result, within(progress, *SHARES["engines"]))
    few_steps = make_few_steps(folder, engines, result, within(progress, *SHARES["few steps"]))
    stairs = ["teacher eager", f"{FEW_FROM} eager", *(subject.label for subject in few_steps)]
    every = [*subjects, *few_steps]
    compare_all(every, stairs, folder, settings, result, within(progress, *SHARES["comparison"]), load)
    return result


def made_folders(folder: Path) -> list[Path]:
    """The folders of models and bundles that a run makes in its own, those that are there."""
    bundles = (path for name in (*MODELS, FEW) for path in sorted((folder / "bundles" / name).glob("*")))
    return [path for path in (*(folder / "models" / name for name in (*STUDENTS, FEW)), *bundles) if path.is_dir()]


def check_outputs(folder: Path) -> None:
    """OutputExistsError or InputError, before any work, where a run would replace what sdkd did not write."""
    from sdkd.compare.report.files import check_report_free

    check_report_free(folder, overwrite=True)
    for path in made_folders(folder):
        check_free(path, overwrite=True)
    if not (folder / "report.json").exists():
        check_file_free(folder / PICTURE, overwrite=False)


def _is_fresh(record: Path, key: str) -> bool:
    try:
        return bool(read_json(record).get("key") == key)
    except (InputError, AttributeError):
        return False


def make_students(folder: Path, settings: DemoSettings, result: DemoResult, progress: Progress) -> None:
    """Build each student from the teacher's weights and distil it for a short time, unless it is there already.

    Then one of them for few steps.
    """
    from sdkd.demo import teacher_path

    weights = (teacher_path() / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    made_from = json.dumps([hashlib.sha256(weights).hexdigest(), asdict(settings)], sort_keys=True)
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    stale = [name for name in (*STUDENTS, FEW) if not _is_fresh(folder / "models" / name / RECORD, key)]
    result.reused += [f"student {name}" for name in (*STUDENTS, FEW) if name not in stale]
    if not stale:
        progress("students are fresh, re-used", 1.0)
        return
    pipe, latents = _lessons(settings, within(progress, 0.0, 0.2))
    for index, name in enumerate(stale):
        part = within(progress, 0.2 + 0.8 * index / len(stale), 0.2 + 0.8 * (index + 1) / len(stale), f"{name}: ")
        _make_student(name, pipe, latents, folder / "models", key, settings, part)


def _lessons(settings: DemoSettings, progress: Progress) -> tuple[StableDiffusionPipeline, LatentCache]:
    """The teacher, and the latents of the procedural images that all students learn from."""
    from sdkd.distill.data.latents import encode_images, training_size
    from sdkd.models.resolve import load_eager
    from sdkd.toyworld.scenes import DemoImages

    progress("loading the teacher", 0.0)
    pipe = load_eager("demo")
    images = DemoImages(count=settings.images, seed=settings.seed)
    return pipe, encode_images(pipe.vae, images, size=training_size(pipe, None), progress=progress)


def _make_student(
    name: str,
    teacher: StableDiffusionPipeline,
    latents: LatentCache,
    models: Path,
    key: str,
    settings: DemoSettings,
    progress: Progress,
) -> None:
    from sdkd.distill import train
    from sdkd.distill.training.drawing import result_scheduler
    from sdkd.models.diffusers_folder import write_pipeline
    from sdkd.models.generation import entry
    from sdkd.models.resolve import load_component
    from sdkd.students.blocks import build_student

    config = training_config(name, settings)
    scheduler = result_scheduler(teacher.scheduler, config, None) if config.kind.consistency else None
    student = load_component(models / FEW_FROM, "unet") if name == FEW else build_student(teacher.unet, name)
    with new_folder(models / name, overwrite=True) as partial:
        train(teacher, student, latents, config, progress=progress, folder=partial)
        about = {"teacher": "demo", "student": config.spec.name, "data": "demo", "settings": config.to_json()}
        about |= entry(config.generation(None))
        write_pipeline(teacher, partial, unet=student, scheduler=scheduler, about=about)
        _keep_teacher_files(partial)
        write_json(partial / RECORD, {"key": key, "settings": asdict(settings)})


def training_config(name: str, settings: DemoSettings) -> TrainConfig:
    """How a student is trained: by KD, or for few steps, with the comparison's guidance scale in its answers."""
    from sdkd.distill import TrainConfig

    shared: dict[str, Any] = {
        "batch_size": settings.batch_size, "learning_rate": settings.learning_rate, "precision": "fp32",
        "seed": settings.seed,
    }  # fmt: skip
    if name != FEW:
        return TrainConfig(student=name, steps=settings.distill_steps, **shared)
    w = settings.guidance_scale - 1
    return TrainConfig(
        objective="consistency", student=FEW_FROM, steps=settings.consistency_steps, guidance=(w - 1, w + 1),
        solver_steps=20, snr_gamma=5.0, feature_weight=settings.consistency_feature_weight, caption_dropout=0.0,
        **shared,
    )  # fmt: skip


def _keep_teacher_files(folder: Path) -> None:
    """The student's text encoder and VAE are the teacher's: the very files, so that their exports are shared."""
    from sdkd.demo import teacher_path

    for part in ("text_encoder", "vae"):
        shutil.rmtree(folder / part)
        shutil.copytree(teacher_path() / part, folder / part)


def wanted_engines(skipped: dict[str, str]) -> list[EnginePlan]:
    """The engines that this machine can build; why not goes into `skipped`, by target."""
    wanted = []
    for target, precision in ENGINES:
        found = availability(target)
        if not found.can_build:
            skipped[target] = f"{found.reason}; {found.fix}"
        elif target == "openvino" and precision not in cpu_precisions():
            skipped[f"{target}-{precision}"] = f"this CPU has no {precision} units"
        else:
            wanted.append(plan_for_model(target, precision))
    return wanted


def make_engines(folder: Path, engines: list[EnginePlan], result: DemoResult, progress: Progress) -> list[Subject]:
    """Export every model, build every engine, and name what can be compared here.

    An engine that is built here but cannot be run is built of FEW_FROM alone.
    """
    from sdkd.compare.measure.subjects import Subject
    from sdkd.models.resolve import resolve

    here = {plan.target.name: availability(plan.target.name) for plan in engines}
    jobs = {name: [plan for plan in engines if here[plan.target.name].can_run or name == FEW_FROM] for name in MODELS}
    subjects, done, total = [], 0, sum(map(len, jobs.values()))
    for name, plans in jobs.items():
        model = "demo" if name == "teacher" else str(folder / "models" / name)
        source = resolve(model)
        role = "teacher" if name == "teacher" else "student"
        subjects.append(Subject(f"{name} eager", model, "eager", "fp32", None, role))
        for plan in plans:
            made = _engine(name, source, plan, folder, result, within(progress, done / total, (done + 1) / total))
            done += 1
            found = here[plan.target.name]
            if found.can_run:
                subjects.append(Subject(f"{name} {made.slot}", model, made.slot, plan.precision, made.bundle, role))
            else:
                result.skipped[plan.target.name] = f"built of {name} alone, and not run: {found.reason}"
    return subjects


def make_few_steps(folder: Path, engines: list[EnginePlan], result: DemoResult, progress: Progress) -> list[Subject]:
    """The student for few steps, with its own VAE and with the small one, and that on the last engine that runs."""
    from sdkd.compare.measure.subjects import Subject
    from sdkd.models.replacements import DEMO, with_vae
    from sdkd.models.resolve import resolve

    model, small = str(folder / "models" / FEW), f"{FEW}, small VAE"
    source, vae = resolve(model), (("vae", DEMO),)
    found = [
        Subject(f"{FEW} eager", model, role="student", run=source.generation),
        Subject(f"{small} eager", model, role="student", run=source.generation, replaced=vae),
    ]
    for plan in [plan for plan in engines if availability(plan.target.name).can_run][-1:]:
        made = _engine(FEW, with_vae(source, DEMO), plan, folder, result, progress)
        engine = (made.slot, plan.precision, made.bundle, "student", vae)
        found.append(Subject(f"{small} {made.slot}", model, *engine, run=source.generation))
    return found


def _engine(
    name: str, model: Model, plan: EnginePlan, folder: Path, result: DemoResult, progress: Progress
) -> Prepared:
    """The engine of a model in its bundle, exported and built unless it is fresh."""
    from sdkd.workflow import prepare

    part = within(progress, 0.0, 1.0, f"{name}, {plan.target.name} {plan.precision}: ")
    bundles = folder / "bundles"
    made = prepare(model, plan, bundles / name, ranges=demo_ranges(), reuse=bundles / "teacher", progress=part)
    if not (made.exported or made.built):
        result.reused.append(f"{made.slot} engine of {name}")
    return made


def demo_ranges() -> ShapeRanges:
    """Shapes of the demo's engines: its native 64 pixels, up to four images a call."""
    return ShapeRanges(Range(1, 1, 4), Range.fixed(64), Range.fixed(64), Range.fixed(77))


def compare_all(
    subjects: list[Subject],
    stairs: list[str],
    folder: Path,
    settings: DemoSettings,
    result: DemoResult,
    progress: Progress,
    load: Sequence[float] | None = None,
) -> None:
    """Generate the same prompts with each subject, measure, and write the report into `folder`.

    `stairs`: labels of the staircase; `load`: the machine's load average before anything was trained or built.
    """
    from sdkd.compare import compare, write_report
    from sdkd.toyworld.reader import judge_captions

    result.report = compare(
        subjects,
        prompts=list(settings.prompts),
        steps=settings.sampling_steps,
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
        runs=settings.runs,
        judge=judge_captions,
        isolate=True,
        load_before=load,
        staircase=stairs,
        progress=progress,
    )
    write_report(result.report, folder, overwrite=True)
    draw(result.report, folder / PICTURE)
