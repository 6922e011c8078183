"""Which of a bundle's slots runs here, why the others do not, and engines that are built again meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from engines.parts import BASE_PARTS, PARTS
from sdkd.bundle import Bundle
from sdkd.errors import BundleError, EngineError, MissingExtraError, StaleEngineError
from sdkd.targets import availability, check_target, environment

T = TypeVar("T")
log = logging.getLogger(__name__)

ORDER = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")


def best_slot(bundle: Bundle, parts: Sequence[str] = BASE_PARTS) -> str:
    """The fastest slot whose engines are complete, fresh and run here; EngineError lists why each one is not."""
    slots = sorted(
        bundle.slots(), key=lambda slot: (ORDER.index(check_target(slot).name), slot != check_target(slot).name)
    )
    refused: dict[str, str] = {}
    for slot in slots:
        reason = why_not(bundle, slot, parts)
        if reason is None:
            for other, text in refused.items():
                log.warning("engine %s was passed over for %s: %s", other, slot, text)
            return slot
        refused[slot] = reason
    found = "; ".join(f"{slot}: {reason}" for slot, reason in refused.items()) or "it has none"
    runnable = next((name for name in ORDER if (here := availability(name)).can_run and here.can_build), "onnxruntime")
    raise EngineError(
        f"no engine of {str(bundle.path)!r} runs here ({found}). Build one with: {bundle.build_command(runnable)}"
    )


def why_not(bundle: Bundle, slot: str, parts: Sequence[str]) -> str | None:
    """Why a slot's engines cannot run here, in words with the repair, or None when they can. Files are not read."""
    here = availability(check_target(slot).name)
    if not here.can_run:
        return f"{here.reason} ({here.fix})"
    try:
        for name in (name for part in parts for name in PARTS[part].required):
            record = bundle.engine(slot, name)
            bundle.check_fresh(record, environment(record.target))
    except (BundleError, StaleEngineError, MissingExtraError) as error:
        return str(error)
    return None


def of_newest(bundle: Bundle, slot: str, component: str, act: Callable[[Bundle], T]) -> T:
    """`act` with a bundle, and again with its newest engine when that fails and one was built since it was opened.

    A builder removes the files that its manifest replaced.
    """
    while True:
        try:
            return act(bundle)
        except (BundleError, EngineError, OSError):
            again = _built_again(bundle, slot, component)
            if again is None:
                raise
            bundle = again


def _built_again(bundle: Bundle, slot: str, component: str) -> Bundle | None:
    """The bundle with the engine that it has now, of the same exported component; None when it is the one it had."""
    try:
        now = Bundle.open(bundle.path)
        record, exported = now.engine(slot, component), now.component(component)
    except BundleError:
        return None
    then = bundle.manifest
    same = then.engines.get(f"{slot}/{component}") == record or then.components.get(component) != exported
    return None if same else replace(bundle, manifest=then.with_engine(record))
