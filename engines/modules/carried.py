"""What the eager modules of a pipeline carry beyond what a bundle holds: asked before an engine stands in for them.

An engine computes what was exported, and takes adapters over (`engines.lora.layers`). Patched forward passes,
other attention, more tokens, other weights would be gone without a word: they are refused here, by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from sdkd.bundle.manifest import Bundle, ComponentRecord
from sdkd.bundle.onnx_index import StoredWeight, stored_weights_of
from sdkd.core.components import STATE_PREFIXES
from sdkd.core.contract import torch_dtype
from sdkd.errors import InputError, ModelError

CheckWeights = Literal["sample", "all", "none"]
RUN = 64  # numbers that are compared at the beginning, in the middle and at the end of a weight
WHOLE = 16_384  # numbers of a weight that is compared as a whole; of a table with more rows, one number of each row
# Attention that computes the same in another way; any other is part of what a module computes.
PLAIN_ATTENTION = (
    *("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"),
    *("AttnProcessorNPU", "XLAFlashAttnProcessor2_0"),
    # An IP-Adapter's, which a graph has: see check_agreement.
    *("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor"),
)
UNFUSED = ("to_qkv", "to_kv")  # stay in an attention module when fused projections are taken apart
# What diffusers does not ask of a text encoder, and what is no weight.
EXTRA = ("text_projection.weight", "embeddings.position_ids")


def check_how(how: str) -> None:
    """InputError unless `how` says which weights to compare."""
    if how not in get_args(CheckWeights):
        raise InputError(f"check_weights is {how!r}: choose from {', '.join(get_args(CheckWeights))}")


def check_attention(name: str, module: Any) -> None:
    """ModelError for attention processors that are more than another kernel: a graph could hold them, when exported."""
    for path, kind in ((path, type(it).__name__) for path, it in getattr(module, "attn_processors", {}).items()):
        if kind not in PLAIN_ATTENTION:
            raise ModelError(
                f"{name}.{path.removesuffix('.processor')} of this pipeline has attention of its own ({kind}), which "
                "an engine would be without: call the module's set_default_attn_processor() first"
            )


def check_tokens(tokenizer: Any, bundle: Bundle, part: str) -> None:
    """ModelError when a tokenizer knows tokens that the bundle's text encoder, `part`, has no embedding for."""
    size = int(bundle.config(part)["vocab_size"])
    if tokenizer is None or len(tokenizer) <= size:
        return
    more = [token for token, place in tokenizer.get_added_vocab().items() if place >= size]
    raise ModelError(
        f"the tokenizer of this pipeline knows {len(tokenizer) - size} tokens more than the {size} of the text encoder "
        f"in bundle {str(bundle.path)!r} ({', '.join(map(repr, more[:3])) or 'as after a textual inversion'}): call "
        f"pipe.unload_textual_inversion() first, leave {part} out of components, or export this pipeline"
    )


# Weights


@dataclass(frozen=True)
class Given:
    """The weights that an eager module, or another graph, has: how its names and shapes are, and how to read some."""

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, StoredWeight, Sequence[tuple[int, int]]], torch.Tensor]


def eager_tensors(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that they have without adapters and without torch.compile."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    plain = {name.replace("_orig_mod.", "").replace(".base_layer.", "."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in plain.items() if ".lora_" not in name}


def of_module(module: Any) -> Given:
    """The weights of an eager module."""
    tensors = {_plain(name): tensor.detach() for name, tensor in eager_tensors(module).items()}

    def read(name: str, stored: StoredWeight, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        places = torch.tensor(list(itertools.chain.from_iterable(range(*span) for span in spans)), dtype=torch.long)
        index = torch.unravel_index(places, stored.stored) if stored.stored else ()
        index = index[::-1] if stored.transposed else index
        tensor = tensors[name]
        return tensor[tuple(one.to(tensor.device) for one in index)].cpu().reshape(-1)

    return Given(type(module).__name__, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, read)


def of_graph(bundle: Bundle, component: str) -> Given:
    """The weights of another bundle's component."""
    stored = _named(bundle, bundle.component(component))
    shapes = {name: weight.shape for name, weight in stored.items()}
    return Given(f"an engine of {str(bundle.path)!r}", shapes, lambda name, _, spans: stored[name].read(spans))


def _plain(name: str) -> str:
    """Transformers 4 begins the names of a text encoder with `text_model.`, 5 does not."""
    return name.removeprefix("text_model.")


def _named(bundle: Bundle, record: ComponentRecord) -> dict[str, StoredWeight]:
    file = bundle.path / record.files[0].path
    return {_plain(name): weight for name, weight in stored_weights_of(file).items()} if file.is_file() else {}


def check_weights_of(part: str, given: Given, bundle: Bundle, component: str, how: CheckWeights) -> bool:
    """Whether weights could be compared; ModelError when they are not the bundle's, within what rounding explains.

    `how`: `sample` compares numbers of every weight, `all` all of them.
    """
    record = bundle.component(component)
    stored = _named(bundle, record)
    if not stored:
        return False
    known = {*stored, *map(_plain, record.details.get("unmatched_weights", ())), *EXTRA}
    prefixes = STATE_PREFIXES.get(component, ("",))
    own = [name for name in given.shapes if name.startswith(prefixes) and not set(name.split(".")) & set(UNFUSED)]
    wrong = [
        *(f"{name} is in the bundle alone" for name in stored if name not in given.shapes),
        *(f"{name} is in the pipeline alone" for name in own if name not in known),
        *_differences(given, stored, record.precision, how),
    ]
    if wrong:
        raise ModelError(
            f"the {part} of this pipeline ({given.kind}) has other weights than {component} of bundle "
            f"{str(bundle.path)!r}: {wrong[0]}{f' ({len(wrong) - 1} more)' if wrong[1:] else ''}. Export this pipeline "
            "with all that is fused into it; or run the bundle's weights, plug(..., check_weights='none'), and give "
            "engines others with engines.swap_weights"
        )
    return True


def _differences(given: Given, stored: Mapping[str, StoredWeight], precision: str, how: CheckWeights) -> Iterator[str]:
    for name, weight in stored.items():
        if name not in given.shapes:
            continue
        if given.shapes[name] != weight.shape:
            yield f"{name} is {list(given.shapes[name])} there and {list(weight.shape)} in the bundle"
            continue
        spans = _spans(weight.stored, how)
        if not _agree(weight.read(spans), given.read(name, weight, spans), precision):
            yield f"{name} differs"


def _spans(shape: Sequence[int], how: CheckWeights) -> list[tuple[int, int]]:
    count = math.prod(shape)
    if how == "all" or count <= WHOLE:
        return [(0, count)]
    if len(shape) == 2 and shape[0] > WHOLE:  # token embeddings, of which textual inversion changes single ones
        return [(row * shape[1], row * shape[1] + 1) for row in range(shape[0])]
    middle = (count - RUN) // 2
    return [(0, RUN), (middle, middle + RUN), (count - RUN, count)]


def _agree(ours: torch.Tensor, theirs: torch.Tensor, precision: str) -> bool:
    """Whether numbers are the same, rounded to the coarser dtype of the two and of the precision of the bundle.

    What adding and taking away an adapter leaves behind in that dtype is rounding, too.
    """
    kinds = (ours.dtype, theirs.dtype, torch_dtype(precision))
    coarse = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    one, other = (tensor.to(coarse).double() for tensor in (ours, theirs))
    size, apart = one.square().mean().sqrt(), (one - other).abs()
    limit = max(torch.finfo(coarse).eps / 2, 1e-6)
    alone = apart <= 8 * limit * (one.abs() + size) + 6e-8  # each number by itself
    return bool(apart.square().mean().sqrt() <= limit * size + 6e-8) and bool(alone.all())
