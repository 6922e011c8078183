"""Which weights of an engine may be exchanged later: those that a LoRA can touch, by their state-dict names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from export.build.job import Job
from sdkd.errors import BuildError
from sdkd.targets.tensorrt_api import INetworkDefinition, TensorRT

# A LoRA adds to matrices and convolutions: of attention and feed-forward (LoRA), of the blocks around them (LoCon), of
# CLIP's layers. Norms, biases, time and token embeddings stay.
TOUCHED = {
    "unet": r"(^|\.)((attentions|resnets|downsamplers|upsamplers)\.\d+\..*|conv_in\.|conv_out\.)",
    "text_encoder": r"\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.",
}


def lora_weights(job: Job) -> tuple[str, ...]:
    """Names of a graph's weights that a LoRA can touch, in the graph's order; () for a component without any."""
    import onnx

    if job.component not in TOUCHED:
        return ()
    graph = onnx.load(job.onnx, load_external_data=False).graph
    return touched(job.component, {tensor.name: len(tensor.dims) for tensor in graph.initializer})


def touched(component: str, ranks: dict[str, int]) -> tuple[str, ...]:
    """Of weights by name and number of axes, those that a LoRA can touch."""
    pattern = re.compile(TOUCHED[component])
    return tuple(
        name for name, rank in ranks.items() if rank >= 2 and name.endswith(".weight") and pattern.search(name)
    )


def has_marks(trt: TensorRT) -> bool:
    """Whether a library can make single weights refittable; otherwise all are, which costs more speed."""
    return hasattr(trt.BuilderFlag, "REFIT_INDIVIDUAL") and hasattr(trt.INetworkDefinition, "mark_weights_refittable")


def mark_weights(trt: TensorRT, network: INetworkDefinition, names: Sequence[str]) -> tuple[str, ...]:
    """Mark weights as refittable and return their names; () where the library cannot mark.

    Raises BuildError for a name that the network does not have: a later swap would change nothing.
    """
    if not has_marks(trt):
        return ()
    unknown = [name for name in names if not network.mark_weights_refittable(name)]
    if unknown:
        raise BuildError(
            f"the network has lost {len(unknown)} of the {len(names)} weights that a LoRA can touch, first "
            f"{unknown[0]!r}: export the model again, or build with --refit all"
        )
    return tuple(names)
