"""From what a user names (models, targets, prompts) to subjects: which engines are used, built or left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdkd.bundle.manifest import REPLACEMENTS, Bundle
from sdkd.compare.measure.caching import why_whole, with_caching
from sdkd.compare.measure.calls import Size
from sdkd.compare.measure.defaults import AS_MADE, RunsAsked, native_px, runs_of
from sdkd.compare.measure.peers import Peer, check_graphs, peer_of
from sdkd.compare.measure.refusals import check_engines, check_models, check_targets, in_torch
from sdkd.compare.measure.subjects import EAGER, STUDENT, TEACHER, Failed, Subject, check_subjects
from sdkd.core.console import Progress, quiet, within
from sdkd.core.contract import check_engine_precision
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BuildError, BundleError, EngineError, ExportError, InputError, ModelError, SdkdError
from sdkd.models.fused import Lora, recorded_loras, with_loras
from sdkd.models.generation import Generation
from sdkd.models.kinds import BundleSource
from sdkd.models.replacements import WithVae, short_vae, with_vae
from sdkd.models.resolve import Model, ModelSource, resolve
from sdkd.targets.plan import plan_for_model
from sdkd.targets.registry import TARGETS, availability, check_target, slot_precision, uses_gpu

ONNX_ENGINE = "onnxruntime"  # whose bundle peers get: the ONNX files that this engine was built from
TOKENS = 77  # CLIP's prompt length in all Stable Diffusion 1.x and 2.x models


@dataclass
class Plan:
    """Subjects to compare, those whose engines could not be built, and in words what was left out and why."""

    subjects: list[Subject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """What applies to every model: targets (None: what runs here), precision of new engines, size, bundles, batch.

    `vae`: every model is compared with this one, too. `runs`: steps, guidance scale and scheduler that count for all.
    `staircase`: instead of every model on every target, a series in which each adds one change; see `_series`.
    `cache_interval`: above 1, every model that step caching suits is compared with it, too.
    """

    targets: tuple[str, ...] | None
    precision: str | None
    size: Size | None
    bundles: Path
    batch: int = 1
    vae: str | None = None
    runs: RunsAsked = AS_MADE
    staircase: bool = False
    cache_interval: int = 1


@dataclass(frozen=True)
class Entry:
    """A model of a comparison: its name in labels, what it is to the others, and how it is run."""

    source: ModelSource
    name: str
    role: str
    run: Generation


Builder = Callable[[Progress], Subject]
"""Exports and builds what is missing or stale for a subject."""


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
    if wish.precision is not None:
        check_engine_precision(wish.precision)
    runs, notes = runs_of(sources, wish.runs)
    plan.notes += notes
    peers = tuple(found[0] for target in wish.targets or () if (found := peer_of(target)))
    homes = {name: (source, runs[source.name], peers) for name, source in zip(names, sources, strict=True)}
    size = check_models(homes, wish.size)
    wanted: list[tuple[Subject, Builder | None]] = []
    if wish.staircase:
        entries = _series(sources, names, runs, wish)
    else:
        variants = _with_vae(sources, names, roles, wish.vae, plan)
        own = [(source, name, roles[source.name]) for source, name in zip(sources, names, strict=True)]
        entries = [(Entry(*each, runs[each[0].name]), wish) for each in (*own, *variants)]
    for entry, own_wish in entries:
        if isinstance(entry.source, BundleSource):
            wanted += [(subject, None) for subject in _of_bundle(plan, entry, entry.source, own_wish, size)]
        else:
            wanted += _of_model(entry, own_wish, size)
    wanted, whole = with_caching(wanted, wish.cache_interval)
    plan.notes += whole
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


def _series(
    sources: Sequence[ModelSource], names: Sequence[str], runs: Mapping[str, Generation], wish: Wish
) -> list[tuple[Entry, Wish]]:
    """The models in eager float32, the last one with `wish.vae`, and the last of all on each engine of `wish.targets`.

    The first is the teacher of all. InputError for what is no single change: bundles, targets of PyTorch, step caching
    of every row.
    """
    if wish.cache_interval > 1:
        raise InputError(
            f"cache interval {wish.cache_interval} would change every row of a staircase: leave one of the two out"
        )
    for source in sources:
        if isinstance(source, BundleSource):
            raise InputError(
                f"{source.name!r} is a bundle, and a staircase goes from models in PyTorch to engines of the last one: "
                "give the model that it was made from, or leave --staircase out"
            )
    for target in wish.targets or ():
        if in_torch(target):
            raise InputError(
                f"target {target!r} is no step of a staircase, whose models are in eager fp32: give engines, such as "
                "openvino-bf16, or leave --staircase out"
            )
    found = [
        Entry(source, name, STUDENT if place else TEACHER, runs[source.name])
        for place, (source, name) in enumerate(zip(sources, names, strict=True))
    ]
    if wish.vae is not None:
        last = with_vae(sources[-1], wish.vae)
        found.append(Entry(last, f"{names[-1]} with {short_vae(wish.vae)}", STUDENT, runs[last.name]))
    if len(found) + len(wish.targets or ()) < 2:
        raise InputError("a staircase of one subject has no step: give more models, --vae or --targets")
    eager = replace(wish, targets=(EAGER,))
    return [
        *((entry, eager) for entry in found[:-1]),
        (found[-1], replace(wish, targets=(EAGER, *(wish.targets or ())))),
    ]


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


def _subject(
    entry: Entry, target: str, runs_on: str, precision: str, *, model: str | None = None, bundle: Path | None = None,
    **made_with: Any,
) -> Subject:  # fmt: skip
    """An entry on a target; `model`: where its PyTorch weights are, if not where it is."""
    label, model = f"{entry.name} {target}", model or entry.source.name
    return Subject(label, model, runs_on, precision, bundle, entry.role, run=entry.run, **made_with)


def _torch_subjects(entry: Entry, targets: tuple[str, ...] | None, **made_with: Any) -> list[Subject]:
    wanted = {target: in_torch(target) for target in ((EAGER,) if targets is None else targets)}
    return [_subject(entry, target, *found, **made_with) for target, found in wanted.items() if found]


def _of_model(entry: Entry, wish: Wish, size: Size | None) -> list[tuple[Subject, Builder | None]]:
    """Any model but a bundle: eager, and an engine for every target, built where it is missing or stale."""
    replaced = (("vae", entry.source.vae),) if isinstance(entry.source, WithVae) else ()
    eager = _torch_subjects(entry, wish.targets, replaced=replaced)
    targets = _engine_targets(wish.targets)
    if targets and wish.size is None and size is not None and (own := native_px(entry.source)) not in (None, size[0]):
        raise InputError(
            f"{entry.name!r} makes images of {own} px, and this comparison is of {size[0]} px: give --size, and "
            "engines are built for that"
        )
    found: list[tuple[Subject, Builder | None]] = [(subject, None) for subject in eager]
    return found + [_engine_to_build(entry, target, wish) for target in targets]


def _engine_to_build(entry: Entry, target: str, wish: Wish) -> tuple[Subject, Builder]:
    """The subject that an engine will be, and what builds it; raises what building it would raise at once."""
    from export.build.request import check_buildable
    from sdkd.workflow import prepare

    peer = peer_of(target)
    source, built, ranges = entry.source, target if peer is None else ONNX_ENGINE, _ranges(wish)
    folder, reuse = wish.bundles / entry.name, None
    if isinstance(source, WithVae):  # its text encoder and UNet are those of the model with its own VAE
        vae = short_vae(source.vae)
        reuse = wish.bundles / entry.name.removesuffix(f" with {vae}")
        folder = reuse.with_name(f"{reuse.name}-{vae}")
    asked = "fp32" if peer is not None and peer[0].precisions else slot_precision(built) or wish.precision
    plan = plan_for_model(built, asked)
    cached = wish.cache_interval > 1 and not why_whole(source, entry.run, wish.cache_interval)
    check_buildable(plan.target)
    slot = plan.slot if peer is None else target

    def build(progress: Progress) -> Subject:
        made = prepare(source, plan, folder, ranges=ranges, cached=cached, reuse=reuse, progress=progress)
        return _engine_subject(entry, source.name, made.bundle, slot)

    return _subject(entry, slot, *_runs_on(slot, peer, plan.precision), bundle=folder / plan.onnx), build


def _engine_targets(targets: tuple[str, ...] | None) -> list[str]:
    if targets is None:  # of one that is for both GPU and CPU, its engines for a GPU: on a CPU others are faster
        worth = [name for name, kind in TARGETS.items() if not kind.either or uses_gpu(kind)]
        return [name for name in worth if (here := availability(name)).can_run and here.can_build]
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


def _engine_subject(entry: Entry, model: str, bundle: Path, slot: str) -> Subject:
    opened, peer = Bundle.open(bundle), peer_of(slot)
    if peer is None:
        precision = opened.engine(slot, "unet").precision
    else:
        check_graphs(peer[0], opened)
        precision = opened.component("unet").precision
    runs_on = _runs_on(slot, peer, precision)
    return _subject(entry, slot, *runs_on, model=model, bundle=bundle, **_made_with(opened))


def _runs_on(slot: str, peer: tuple[Peer, str] | None, precision: str) -> tuple[str, str]:
    """Target and precision of a subject: a slot's; a peer's, in what it was asked for where it has a choice."""
    if peer is None:
        return slot, precision
    return peer[0].name, peer[1] if peer[0].precisions else precision


def _made_with(bundle: Bundle) -> dict[str, Any]:
    """What the bundle was exported with beside its model's own weights: `replaced` and `loras` of a Subject."""
    source = bundle.manifest.source
    replaced = tuple((part, str(source[part])) for part in REPLACEMENTS if part in source)
    return {"replaced": replaced, "loras": recorded_loras(source)}


def _of_bundle(plan: Plan, entry: Entry, source: BundleSource, wish: Wish, size: Size | None) -> list[Subject]:
    """A bundle: its engines as they are, and the model it was made from as eager where that can be had."""
    bundle, origin = source.bundle, _origin(source)
    model = source.name if origin is None else origin.name
    made_with = _made_with(bundle)
    found = _torch_subjects(entry, wish.targets, model=model, **made_with)
    if found and (why := _why_not_eager(model, **made_with)):
        plan.notes.append(f"{entry.name}: no eager baseline ({why})")
        found = []
    asked = None if wish.targets is None else _engine_targets(wish.targets)
    for slot in bundle.slots() if asked is None else asked:
        here = None if peer_of(slot) else availability(check_target(slot).name)
        if here is not None and not here.can_run:
            plan.notes.append(f"{entry.name}: {slot} was left out ({here.reason}; {here.fix})")
            continue
        found.append(_engine_subject(entry, model, bundle.path, slot))
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
