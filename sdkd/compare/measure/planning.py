"""From what a user names (models, targets, prompts) to subjects: which engines are used, built or left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.bundle.manifest import REPLACEMENTS, Bundle
from sdkd.compare.measure.calls import Size
from sdkd.compare.measure.refusals import check_engines, check_models, check_targets, in_torch, torch_precision
from sdkd.compare.measure.subjects import EAGER, OPTIMUM, STUDENT, TEACHER, Failed, Subject, check_subjects
from sdkd.core.console import Progress, quiet, within
from sdkd.core.contract import check_precision
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.core.text_files import prompts_of
from sdkd.errors import BuildError, BundleError, EngineError, ExportError, InputError, ModelError, SdkdError
from sdkd.models.fused import Lora, recorded_loras, with_loras
from sdkd.models.kinds import BundleSource
from sdkd.models.replacements import WithVae, short_vae, with_vae
from sdkd.models.resolve import Model, ModelSource, resolve
from sdkd.models.schedulers import scheduler_class
from sdkd.targets.plan import plan_for_model
from sdkd.targets.registry import TARGETS, availability, check_target, slot_precision

if TYPE_CHECKING:
    from sdkd.compare.measure.comparison import Judge

ONNX_ENGINE = "onnxruntime"  # whose bundle Optimum gets: the ONNX files that this engine was built from
TOKENS = 77  # CLIP's prompt length in all Stable Diffusion 1.x and 2.x models
SMALL_PX = 64  # models of at most this size are trained on drawn shapes, like the demo's
SHAPES = (
    "a large red star on a white background",
    "a large yellow heart on a blue background",
    "a medium green circle on a black background",
    "a large blue cross on a yellow background",
)
PHOTOGRAPHS = (
    "a photograph of an astronaut riding a horse",
    "a watercolour of a lighthouse at dusk",
    "a bowl of oranges on a wooden table, soft morning light",
)


GUIDANCE, SMALL_GUIDANCE = 7.5, 4.0  # diffusers' default; what suits drawn shapes


@dataclass
class Plan:
    """Subjects to compare, those whose engines could not be built, and in words what was left out and why."""

    subjects: list[Subject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """What applies to every model: targets (None: what runs here), precision of new engines, size, bundles, batch.

    `steps` and `scheduler` are looked at before anything is built. `vae`: every model is compared with this one, too.
    """

    targets: tuple[str, ...] | None
    precision: str | None
    size: Size | None
    bundles: Path
    batch: int = 1
    steps: int = 1
    scheduler: str | None = None
    vae: str | None = None


Builder = Callable[[Progress], Subject]
"""Exports and builds what is missing or stale for a subject."""


def parse_prompts(text: str | None, models: Sequence[Model]) -> tuple[str, ...]:
    """Prompts from a file (one per line) or `a;b`; by default such as the models know. InputError when empty."""
    if text is None:
        return SHAPES if all(map(_is_small, models)) else PHOTOGRAPHS
    return prompts_of(text)


def default_guidance(models: Sequence[Model]) -> float:
    """The guidance scale that suits the models, where none is asked for."""
    return SMALL_GUIDANCE if all(map(_is_small, models)) else GUIDANCE


def default_judge(models: Sequence[Model], prompts: Sequence[str], size: Size | None) -> Judge | None:
    """The reader of drawn shapes, where all models are small and all prompts are captions of such drawings."""
    from sdkd.toyworld.reader import LEAST_PX, are_captions, judge_captions

    sources = [resolve(model) for model in models]
    sides = [side for source in sources if (side := _native_px(source)) is not None and side <= SMALL_PX]
    readable = (
        all(map(_from_text_alone, sources))
        and len(sides) == len(sources)
        and (min(size) if size else min(sides, default=0)) >= LEAST_PX
    )
    return judge_captions if readable and are_captions(prompts) else None


def _from_text_alone(source: ModelSource) -> bool:
    """Whether a model of this machine draws from prompts, not from images, too."""
    if isinstance(source, BundleSource) and "controlnet" in source.bundle.manifest.components:
        return False
    return not source.here or int(source.unet_config.get("in_channels", 4)) == 4


def _is_small(model: Model) -> bool:
    side = _native_px(resolve(model))
    return side is not None and side <= SMALL_PX


def _native_px(source: ModelSource) -> int | None:
    """The side of a model's own images in pixels, from configs of this machine; None where they do not tell."""
    size = source.native_size if source.here else None
    return size[0] if size is not None and size[0] == size[1] else None


def make_plan(
    models: Sequence[Model], wish: Wish, progress: Progress = quiet, check: Callable[[list[str]], object] = list
) -> Plan:
    """Subjects for every model on every target, missing engines built into `wish.bundles`.

    First everything is refused that can be, `check` with the labels of all subjects among it; an engine that cannot be
    built then is one of the plan's `failed`. A target that was not asked for by name and does not run here is left out
    with a note. Raises InputError for an unknown target, a size, batch or number of steps that a model cannot have.
    """
    sources, plan = [resolve(model) for model in models], Plan()
    names = short_names([source.name for source in sources])
    check_targets(wish.targets)
    roles = find_roles(sources)
    if wish.scheduler is not None:
        scheduler_class(wish.scheduler)
    if wish.precision is not None:
        check_precision(wish.precision)
    size = check_models(dict(zip(names, sources, strict=True)), wish.size, wish.steps, wish.scheduler)
    wanted: list[tuple[Subject, Builder | None]] = []
    variants = _with_vae(sources, names, roles, wish.vae, plan)
    own = [(source, name, roles[source.name]) for source, name in zip(sources, names, strict=True)]
    for source, name, role in (*own, *variants):
        if isinstance(source, BundleSource):
            wanted += [(subject, None) for subject in _of_bundle(plan, source, name, role, wish, size)]
        else:
            wanted += _of_model(source, name, role, wish, size)
    if not wanted:
        raise InputError(
            f"nothing of {', '.join(source.name for source in sources)} can be compared here: {'; '.join(plan.notes)}"
        )
    check_subjects([subject for subject, _ in wanted])
    check([subject.label for subject, _ in wanted])
    for place, (subject, build) in enumerate(wanted):
        part = within(progress, place / len(wanted), (place + 1) / len(wanted), f"{subject.label}: ")
        try:
            plan.subjects.append(subject if build is None else build(part))
        except (BuildError, BundleError, EngineError, ExportError, ModelError) as error:
            plan.failed.append(Failed.of(subject, error))
    return plan


def _with_vae(
    sources: Sequence[ModelSource], names: Sequence[str], roles: dict[str, str], vae: str | None, plan: Plan
) -> list[tuple[ModelSource, str, str]]:
    """Every model with another VAE, its name and role: students, so that they are held against the first teacher, which
    the first model is where there was none. InputError when all are bundles, which keep the VAE in them.
    """
    if vae is None:
        return []
    own = [(source, name) for source, name in zip(sources, names, strict=True) if not isinstance(source, BundleSource)]
    if not own:
        with_vae(sources[0], vae)
    if len(own) < len(sources):
        plan.notes.append(f"bundles keep the VAE that they were exported with: {short_vae(vae)} is for models alone")
    if TEACHER not in roles.values():
        roles[own[0][0].name] = TEACHER
    return [(with_vae(source, vae), f"{name} with {short_vae(vae)}", STUDENT) for source, name in own]


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each model's name; all of it where that is not unique. InputError for a model given twice."""
    if twice := sorted({model for model in models if models.count(model) > 1}):
        raise InputError(f"model {twice[0]!r} is given twice: give each model once")
    short = [Path(model).name.removesuffix(".safetensors").replace(":", "-") or model for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def find_roles(models: Sequence[Model]) -> dict[str, str]:
    """By name: `student` for students that sdkd made; beside one, the first other model is their `teacher`."""
    known = {source.name: _provenance(source) for source in map(resolve, models)}
    students = {model for model, about in known.items() if "student" in about}
    others = [name for name in known if name not in students]
    roles = {name: STUDENT if name in students else "model" for name in known}
    if students and others:
        roles[others[0]] = TEACHER
    return roles


def _provenance(source: ModelSource) -> Mapping[str, Any]:
    return ((_origin(source) if isinstance(source, BundleSource) else None) or source).provenance


def _origin(source: BundleSource) -> ModelSource | None:
    """The model that a bundle was exported from, None when it is gone."""
    try:
        return source.origin
    except ModelError:
        return None


def _torch_subjects(
    model: str, name: str, role: str, targets: tuple[str, ...] | None, **made_with: Any
) -> list[Subject]:
    wanted = [EAGER] if targets is None else [target for target in targets if in_torch(target)]
    return [
        Subject(f"{name} {target}", model, target.partition("-")[0], torch_precision(target), None, role, **made_with)
        for target in wanted
    ]


def _of_model(
    source: ModelSource, name: str, role: str, wish: Wish, size: Size | None
) -> list[tuple[Subject, Builder | None]]:
    """Any model but a bundle: eager, and an engine for every target, built where it is missing or stale."""
    replaced = (("vae", source.vae),) if isinstance(source, WithVae) else ()
    eager = _torch_subjects(source.name, name, role, wish.targets, replaced=replaced)
    targets = _engine_targets(wish.targets)
    if targets and wish.size is None and size is not None and (own := _native_px(source)) not in (None, size[0]):
        raise InputError(
            f"{name!r} makes images of {own} px, and this comparison is of {size[0]} px: give --size, and engines are "
            "built for that"
        )
    found: list[tuple[Subject, Builder | None]] = [(subject, None) for subject in eager]
    return found + [_engine_to_build(source, name, role, target, wish) for target in targets]


def _engine_to_build(source: ModelSource, name: str, role: str, target: str, wish: Wish) -> tuple[Subject, Builder]:
    """The subject that an engine will be, and what builds it; raises what building it would raise at once."""
    from export.build.request import check_buildable
    from sdkd.workflow import prepare

    built, ranges = ONNX_ENGINE if target == OPTIMUM else target, _ranges(wish)
    folder, reuse = wish.bundles / name, None
    if isinstance(source, WithVae):  # its text encoder and UNet are those of the model with its own VAE
        vae = short_vae(source.vae)
        reuse = wish.bundles / name.removesuffix(f" with {vae}")
        folder = reuse.with_name(f"{reuse.name}-{vae}")
    plan = plan_for_model(built, slot_precision(built) or wish.precision)
    check_buildable(plan.target)
    slot = OPTIMUM if target == OPTIMUM else plan.slot

    def build(progress: Progress) -> Subject:
        made = prepare(source, plan, folder, ranges=ranges, reuse=reuse, progress=progress)
        return _engine_subject(source.name, name, role, made.bundle, slot)

    return Subject(f"{name} {slot}", source.name, slot, plan.precision, folder / plan.onnx, role), build


def _engine_targets(targets: tuple[str, ...] | None) -> list[str]:
    if targets is None:
        return [name for name in TARGETS if (here := availability(name)).can_run and here.can_build]
    return [target for target in targets if not in_torch(target)]


def _ranges(wish: Wish) -> ShapeRanges | None:
    """Engines for one call of this size, or the bundle's default shapes; InputError for a batch beyond those."""
    if wish.size is not None:
        height, width = map(Range.fixed, wish.size)
        return ShapeRanges(Range.fixed(wish.batch), height, width, Range.fixed(TOKENS))
    from export.build.ranges import BATCH

    if wish.batch not in BATCH:
        raise InputError(
            f"batch {wish.batch} is outside {BATCH}, which engines are built for by default: give --size, too, and "
            "they are built for that size and batch"
        )
    return None


def _engine_subject(model: str, name: str, role: str, bundle: Path, slot: str) -> Subject:
    opened = Bundle.open(bundle)
    unet = opened.component("unet") if slot == OPTIMUM else opened.engine(slot, "unet")
    precision = unet.precision
    return Subject(f"{name} {slot}", model, slot, precision, bundle, role, **_made_with(opened))


def _made_with(bundle: Bundle) -> dict[str, Any]:
    """What the bundle was exported with beside its model's own weights: `replaced` and `loras` of a Subject."""
    source = bundle.manifest.source
    replaced = tuple((part, str(source[part])) for part in REPLACEMENTS if part in source)
    return {"replaced": replaced, "loras": recorded_loras(source)}


def _of_bundle(plan: Plan, source: BundleSource, name: str, role: str, wish: Wish, size: Size | None) -> list[Subject]:
    """A bundle: its engines as they are, and the model it was made from as eager where that can be had."""
    bundle, origin = source.bundle, _origin(source)
    model = source.name if origin is None else origin.name
    made_with = _made_with(bundle)
    found = _torch_subjects(model, name, role, wish.targets, **made_with)
    if found and (why := _why_not_eager(model, **made_with)):
        plan.notes.append(f"{name}: no eager baseline ({why})")
        found = []
    asked = None if wish.targets is None else _engine_targets(wish.targets)
    for slot in bundle.slots() if asked is None else asked:
        here = None if slot == OPTIMUM else availability(check_target(slot).name)
        if here is not None and not here.can_run:
            plan.notes.append(f"{name}: {slot} was left out ({here.reason}; {here.fix})")
            continue
        found.append(_engine_subject(model, name, role, bundle.path, slot))
        if here is not None:
            check_engines(bundle, slot, size, wish.batch)
    return found


def _why_not_eager(model: str, replaced: Sequence[tuple[str, str]], loras: Sequence[Lora]) -> str | None:
    """Why a bundle's source cannot run eagerly, None when it can; a hub model is tried, it may not be in the cache."""
    from sdkd.models.replacements import replacement_class
    from sdkd.models.resolve import load_eager

    try:
        for part, name in replaced:
            replacement_class(part, name)
        if resolve(model).kind in ("bundle", "hub"):
            load_eager(model)
        with_loras(resolve(model), loras)
    except SdkdError as error:
        return str(error)
    return None
