"""What is refused before anything is built or opened: wishes that a model cannot meet, or nothing here."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from sdkd.bundle.manifest import Bundle
from sdkd.compare.measure.calls import Size
from sdkd.compare.measure.peers import Peer, check_scheduler, peer_of, peer_problem
from sdkd.compare.measure.subjects import IN_TORCH
from sdkd.core.contract import check_precision, check_size, size_multiple
from sdkd.core.numbers import DRAWING, check_numbers
from sdkd.errors import BundleError, EngineError, InputError, ModelError
from sdkd.models.generation import Generation
from sdkd.models.kinds import BundleSource
from sdkd.models.resolve import Model, ModelSource, load_rest, resolve
from sdkd.targets.registry import availability, check_target


def check_targets(targets: tuple[str, ...] | None) -> None:
    """InputError for an unknown target, EngineError for one that cannot run here; knows `eager-bf16`, too."""
    for target in targets or ():
        if (found := peer_of(target)) is not None:
            if problem := peer_problem(found[0]):
                raise EngineError(f"target {target!r} does not run here: {problem}")
        elif in_torch(target):
            continue
        elif not (here := availability(check_target(target).name)).can_run:
            raise EngineError(f"target {target!r} does not run here: {here.reason}. {here.fix}")


def in_torch(target: str) -> tuple[str, str] | None:
    """What runs in PyTorch, without a bundle, and in which precision: `compile-bf16` -> compile, bf16; None for others.

    InputError for an unknown precision.
    """
    name, _, precision = target.partition("-")
    if name in IN_TORCH:
        return name, check_precision(precision or "fp32")
    found = peer_of(target)
    return (found[0].name, found[1]) if found is not None and found[0].from_model else None


def check_asked(prompts: Sequence[str], size: Size | None, **numbers: float | None) -> tuple[str, ...]:
    """The prompts, none of them empty; InputError for those and for numbers that no model could be asked for."""
    kept = tuple(prompts)
    if not kept or not all(prompt.strip() for prompt in kept):
        raise InputError("a comparison needs prompts, none of them empty: give --prompts 'a red star; a blue ring'")
    sides: dict[str, float | None] = dict(zip(("height", "width"), size or (), strict=False))
    check_numbers(numbers | sides, DRAWING | {"image_runs": DRAWING["runs"]})
    return kept


def check_models(homes: Mapping[str, tuple[Model, Generation, tuple[Peer, ...]]], size: Size | None) -> Size | None:
    """InputError, which names it, for a model that cannot have the size or do its steps, on its peers among others;
    nothing is loaded.

    `homes`: by label, the model or bundle of each, how it is to be run, and the peers that run it. Returns the size
    that all are asked for: where none is given, the first's own, None where its config does not tell. A model that
    cannot be read is left for when it is opened. ModelError for one that a peer does not run.
    """
    seen = set[tuple[str, Generation, tuple[Peer, ...]]]()
    for label, (home, run, peers) in homes.items():
        source = resolve(home)
        if (source.name, run, peers) in seen:
            continue
        seen.add((source.name, run, peers))
        with contextlib.suppress(ModelError, BundleError):
            size = size or source.native_size
            try:
                if size is not None:
                    check_size(*size, size_multiple(source.unet_config, source.config("vae")))
                _check_steps(source, run, peers)
            except InputError as error:
                raise InputError(f"{label!r}: {error}") from error
        for peer in peers:
            _check_for(peer, source)
    return size


def _check_for(peer: Peer, source: ModelSource) -> None:
    try:
        read = source.origin if peer.from_model and isinstance(source, BundleSource) else source
        if peer.checks and read.here:
            pkgutil.resolve_name(peer.checks)(read)
    except ModelError as error:
        raise ModelError(
            f"{peer.name} does not run {source.name!r}: {error}; leave target {peer.name!r} out"
        ) from error


def _check_steps(source: ModelSource, run: Generation, peers: Sequence[Peer]) -> None:
    from sdkd.models.schedulers import check_steps, use_scheduler

    pipe = SimpleNamespace(scheduler=_scheduler(source))
    use_scheduler(pipe, run.scheduler)
    check_steps(pipe.scheduler, run.steps)
    for peer in peers:
        check_scheduler(peer, pipe.scheduler)


def _scheduler(source: ModelSource) -> Any:
    """The scheduler that a model or bundle comes with."""
    if not isinstance(source, BundleSource):
        return load_rest(source).scheduler
    from engines.pipelines.pipeline import bundle_scheduler

    return bundle_scheduler(source.bundle)


def check_engines(bundle: Bundle, slot: str, size: Size | None, batch: int) -> None:
    """RangeError, with the command that builds others, for engines that were not built for a call's images.

    BundleError for a slot that the bundle does not have.
    """
    from engines.pipelines.parts import engine_names
    from engines.sessions.ranges import check_images

    for name in engine_names(bundle, slot, bundle.family.parts):
        check_images(bundle, bundle.engine(slot, name), batch, size)
