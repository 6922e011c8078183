"""What the eager modules of a pipeline carry beyond what a bundle holds: asked before an engine stands in for them.

An engine computes what was exported, and takes adapters over (`engines.carried_adapters`). Patched forward passes,
other attention, more tokens, other weights would be gone without a word: they are refused here, by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from sdkd.bundle import Bundle, ComponentRecord
from sdkd.contract import STATE_PREFIXES
from sdkd.errors import InputError, ModelError
from sdkd.onnx_index import StoredWeight, stored_weights_of

if TYPE_CHECKING:
    import torch

CheckWeights = Literal["sample", "all", "none"]
RUN = 64  # numbers that are compared at the beginning, in the middle and at the end of a weight
WHOLE = 16_384  # numbers of a weight that is compared as a whole; of a table with more rows, one number of each row
LIBRARIES = ("diffusers", "transformers", "torch", "peft", "sdkd")  # whose modules do what the exporter saw
# Attention that computes the same in another way; any other is part of what a module computes.
PLAIN_ATTENTION = (
    *("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"),
    *("AttnProcessorNPU", "XLAFlashAttnProcessor2_0"),
)
FREEU = ("s1", "s2", "b1", "b2")  # of an up block
UNFUSED = ("to_qkv", "to_kv")  # stay in an attention module when fused projections are taken apart
# Plain values of a module that change how it computes, and not what.
SWITCHES = (
    "training",
    "gradient_checkpointing",
    "use_slicing",
    "use_tiling",
    "sliceable_head_dim",
    "fused_projections",
)
METHODS = ("forward", "decode", "encode", "__call__")
# What diffusers does not ask of a text encoder, and what is no weight.
EXTRA = ("text_projection.weight", "embeddings.position_ids")


def check_how(how: str) -> None:
    """InputError unless `how` says which weights to compare."""
    if how not in get_args(CheckWeights):
        raise InputError(f"check_weights is {how!r}: choose from {', '.join(get_args(CheckWeights))}")


# Patches


def check_patches(name: str, module: Any) -> None:
    """ModelError naming the first thing that makes a module compute something else than its class and weights say."""
    for path, part in module.named_modules():
        for look in _LOOKS:
            if found := look(part):
                where, (what, repair) = ".".join(filter(None, (name, path))), found
                raise ModelError(f"{where} of this pipeline has {what}, which an engine would be without: {repair}")


def check_layers(name: str, module: Any) -> None:
    """ModelError naming the first layer, or plain value of one, that the module's own config does not give it."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        kind = type(module)
        usual = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    layers = dict(module.named_modules())
    for path, layer in usual.named_modules():
        found = layers.get(path)
        found = getattr(found, "base_layer", found)  # under an adapter
        if found is None:
            continue  # its weights tell
        changed = "class" if type(found) is not type(layer) else _changed(layer, found)
        if changed:
            where = ".".join(filter(None, (name, path)))
            raise ModelError(
                f"{where} of this pipeline has another {changed} than its config says, which an engine would be "
                f"without (such as circular padding): load the {name} again, or export this pipeline"
            )


def _changed(usual: Any, found: Any) -> str | None:
    """The name of the first plain value that differs."""
    plain = (bool, int, float, str, tuple)
    return next(
        (
            name
            for name, value in vars(usual).items()
            if isinstance(value, plain) and not name.startswith(("_", "tile_")) and name not in SWITCHES
            if name in vars(found) and vars(found)[name] != value
        ),
        None,
    )


Found = tuple[str, str] | None  # what a module has, and what to do about it


def _hooks(part: Any) -> Found:
    if "_hf_hook" in vars(part):
        return "hooks of accelerate (offloading)", "call pipe.remove_all_hooks() first"
    if "_diffusers_hook" in vars(part):
        kinds = ", ".join(getattr(part._diffusers_hook, "hooks", {}))
        return f"hooks of diffusers ({kinds})", "load the model again, and leave out casting, caching and offloading"
    for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
        if _root(hook) != "transformers":  # which captures hidden states in this way
            return f"a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)})", "remove it first"
    return None


def _features(part: Any) -> Found:
    own = vars(part)
    if any(own.get(name) is not None for name in FREEU):
        return "FreeU on", "call pipe.disable_freeu() first"
    if getattr(part, "encoder_hid_proj", None) is not None:
        return "an IP-Adapter or another projection (encoder_hid_proj)", "call pipe.unload_ip_adapter() first"
    kind = type(own.get("processor")).__name__
    if kind.startswith("Fused"):  # what they leave behind when they are unfused is harmless
        return "fused QKV projections", "call pipe.unfuse_qkv_projections() first"
    if own.get("processor") is not None and kind not in PLAIN_ATTENTION:
        return f"attention of its own ({kind})", "call the module's set_default_attn_processor() first"
    return None


def _patches(part: Any) -> Found:
    kind = type(part)
    if replaced := next((name for name in METHODS if name in vars(part)), None):
        return f"a {replaced} of its own", "remove the patch (such as DeepCache's) first"
    if _root(kind) not in LIBRARIES or _root(kind.forward) not in LIBRARIES:
        return f"code of its own ({kind.__module__}.{kind.__qualname__})", "take it off first (as tomesd.remove_patch)"
    if hasattr(part, "parametrizations"):
        return "parametrized weights", "call torch.nn.utils.parametrize.remove_parametrizations first"
    return None


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


_LOOKS: tuple[Callable[[Any], Found], ...] = (_hooks, _features, _patches)


def check_tokens(pipe: Any, bundle: Bundle) -> None:
    """ModelError when the tokenizer knows tokens that the bundle's text encoder has no embedding for."""
    tokenizer, size = getattr(pipe, "tokenizer", None), int(bundle.config("text_encoder")["vocab_size"])
    if tokenizer is None or len(tokenizer) <= size:
        return
    more = [token for token, place in tokenizer.get_added_vocab().items() if place >= size]
    raise ModelError(
        f"the tokenizer of this pipeline knows {len(tokenizer) - size} tokens more than the {size} of the text encoder "
        f"in bundle {str(bundle.path)!r} ({', '.join(map(repr, more[:3])) or 'as after a textual inversion'}): call "
        "pipe.unload_textual_inversion() first, leave text_encoder out of components, or export this pipeline"
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
    import torch

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
            "engines others with engines.weights.swap_weights"
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
    import math

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
    import torch

    from sdkd.contract import DTYPES

    kinds = (ours.dtype, theirs.dtype, getattr(torch, DTYPES[precision]))  # type: ignore[index]
    coarse = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    one, other = (tensor.to(coarse).double() for tensor in (ours, theirs))
    if not len(one):
        return True
    size, apart = one.square().mean().sqrt(), (one - other).abs()
    limit = max(torch.finfo(coarse).eps / 2, 1e-6)
    alone = apart <= 8 * limit * (one.abs() + size) + 6e-8  # each number by itself
    return bool(apart.square().mean().sqrt() <= limit * size + 6e-8) and bool(alone.all())
