"""Which of a bundle's slots runs here, and why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engines.pipelines.parts import BASE_PARTS, PARTS
from sdkd.bundle.manifest import Bundle
from sdkd.errors import BundleError, EngineError, MissingExtraError, StaleEngineError
from sdkd.targets.registry import availability, check_target, environment

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
