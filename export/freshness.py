"""Whether a bundle is what an export of a model would make now."""

from __future__ import annotations

from collections.abc import Sequence

from export.graph.to_onnx import choose_opset
from export.pipeline import versions
from sdkd.bundle.manifest import Bundle
from sdkd.core.contract import BASE_COMPONENTS
from sdkd.models.source import ModelSource
from sdkd.targets.plan import EnginePlan


def export_reasons(
    bundle: Bundle, source: ModelSource, plan: EnginePlan, components: Sequence[str] = BASE_COMPONENTS
) -> list[str]:
    """How a bundle differs from what an export of the model would be now, in words: weights, precision, opset,
    libraries; empty when it can be used again.
    """
    digests, records = source.digests, bundle.manifest.components
    changed = [name for name in components if name not in records or records[name].source_sha256 != digests.get(name)]
    reasons = [f"other weights ({', '.join(changed)})"] if changed else []
    if "unet" in components and "unet" in records and (found := records["unet"].precision) != plan.onnx:
        reasons.append(f"precision {found}, not {plan.onnx}")
    for name, record in records.items():  # an older TensorRT does not parse the attention of newer opsets
        if record.opset > (latest := choose_opset(name, None, plan.target.name)):
            reasons.append(f"{name} in opset {record.opset}, later than {latest}")
    made, here = bundle.manifest.versions, versions()
    return reasons + [
        f"{name} {made.get(name)}, here it is {here[name]}" for name in here if made.get(name) != here[name]
    ]
