"""Float32 fallback layers of a float16 graph (`islands` in the manifest): blocks that overflow float16, by a probe.

The decoder of a Stable Diffusion VAE can overflow: its activations grow along the residual stream of the last up blocks
(the largest float16 is 65,504), and the image comes out black. The probe runs the float32 module with large inputs and
looks at everything that flows through its blocks; a block that sees more than float16 can hold, with headroom, keeps
weights and arithmetic in float32, with casts at its edges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sdkd.errors import InputError

# Blocks that keep their insides to themselves: an island is one or several of them, whole.
BLOCKS = (
    *("ResnetBlock2D", "Attention", "Transformer2DModel", "Upsample2D", "Downsample2D", "AutoencoderTinyBlock"),
    *("CLIPEncoderLayer", "CLIPTextEmbeddings", "TimestepEmbedding"),
)
EXACT = "Timesteps"  # given float32 in every precision: half of it would round timesteps and sizes
HEADROOM = 2.0  # other prompts and images may drive activations further than the probe does
# The probe's latents: normal ones as after unscaling, half as large again; and smooth ones, which add up.
PROBE_STRENGTHS = (1.5, 3.0)
PROBE_LATENTS = (16, 24)  # height and width: activations do not grow with the image


@dataclass
class Flow:
    """Largest absolute values that a block saw: in its inputs, anywhere inside, and in its outputs."""

    inputs: float = 0.0
    inside: float = 0.0
    outputs: float = 0.0

    @property
    def largest(self) -> float:
        """Of all three."""
        return max(self.inputs, self.inside, self.outputs)


@dataclass(frozen=True)
class Islands:
    """Blocks to keep in float32 with the reason of each, and what the probe saw; empty for float32 and bfloat16."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    overflowing: frozenset[str] = frozenset()  # islands whose outputs must stay float32, too
    largest: float | None = None
    where: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest: the decision and the figure that it rests on."""
        return {"float32_blocks": dict(self.reasons), "largest_activation": self.largest, "largest_in": self.where}


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a component by module path: known ones, and whatever has no children, outside of them."""
    found: dict[str, nn.Module] = {}

    def walk(path: str, part: nn.Module) -> None:
        children = list(part.named_children())
        if path and (type(part).__name__ in BLOCKS or not children):
            found[path] = part
            return
        for name, child in children:
            walk(f"{path}.{name}" if path else name, child)

    walk("", module)
    return found


@contextlib.contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, Flow]]:
    """Inside, every forward pass of the module adds to the flows of its blocks."""
    parts = blocks(module)
    flows = {path: Flow(inside=_largest(list(block.parameters()))) for path, block in parts.items()}
    handles = []
    for path, block in parts.items():
        handles.append(block.register_forward_hook(_edges(flows[path]), with_kwargs=True))
        handles += [part.register_forward_hook(_inside(flows[path])) for part in block.modules() if part is not block]
        handles += [hook for part in block.modules() for hook in _score_hooks(part, flows[path])]
    try:
        yield flows
    finally:
        for handle in handles:
            handle.remove()


def _edges(flow: Flow) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        flow.inputs = max(flow.inputs, _largest((args, kwargs)))
        flow.outputs = max(flow.outputs, _largest(output))

    return hook


def _inside(flow: Flow) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        flow.inside = max(flow.inside, _largest(output))

    return hook


def _score_hooks(part: nn.Module, flow: Flow) -> list[Any]:
    """Bound the attention scores, which no module gives out: the longest query times the longest key of any head."""
    names = next((pair for pair in (("to_q", "to_k"), ("q_proj", "k_proj")) if hasattr(part, pair[0])), None)
    if names is None:
        return []
    heads = int(getattr(part, "heads", 0) or getattr(part, "num_heads", 1))
    longest: dict[str, float] = {}

    def hook(name: str, width: float) -> Any:
        def note(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
            longest[name] = float(output.float().unflatten(-1, (heads, -1)).norm(dim=-1).max())
            if len(longest) == 2:
                flow.inside = max(flow.inside, longest[names[0]] * longest[names[1]] / width)

        return note

    first = getattr(part, names[0])
    width = (first.out_features / heads) ** 0.5
    return [getattr(part, name).register_forward_hook(hook(name, width)) for name in names]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _largest(value: Any) -> float:
    """Largest absolute value; both ends in one pass, since `abs` would write each tensor once more."""
    found = [tensor for tensor in _tensors(value) if tensor.is_floating_point() and tensor.numel()]
    ends = [torch.aminmax(tensor) for tensor in found]
    return max((max(-float(end.min), float(end.max)) for end in ends), default=0.0)


def find_islands(flows: Mapping[str, Flow], wanted: Iterable[str] = (), *, automatic: bool = True) -> Islands:
    """Which blocks float16 cannot compute, by what flowed through them (`automatic`), and those `wanted` by path.

    `wanted`: paths of blocks or of whatever holds them (`decoder.up_blocks.3`). Raises InputError for a path that
    names no block.
    """
    most = torch.finfo(torch.float16).max / HEADROOM if automatic else float("inf")
    reasons = dict.fromkeys(_named(flows, wanted), "asked for")
    reasons |= {
        path: f"activations up to {flow.largest:,.0f}, more than {most:,.0f}, float16's largest over {HEADROOM:g}"
        for path, flow in flows.items()
        if flow.largest > most
    }
    ordered = {path: reasons[path] for path in flows if path in reasons}
    overflowing = frozenset(path for path in ordered if flows[path].outputs > most)
    where = max(flows, key=lambda path: flows[path].largest, default=None)
    return Islands(ordered, overflowing, round(flows[where].largest, 1) if where else None, where)


def _named(flows: Mapping[str, Flow], wanted: Iterable[str]) -> list[str]:
    found = []
    for name in wanted:
        below = [path for path in flows if path == name or path.startswith(f"{name}.")]
        if not below:
            some = ", ".join(list(flows)[:4])
            raise InputError(f"block {name!r} to keep in float32 does not exist: give a module path such as {some}")
        found += below
    return found


def probe_latents(config: Mapping[str, Any]) -> list[torch.Tensor]:
    """Latents as a VAE decoder may meet them at worst: noise and smooth fields, beyond what training has.

    `config`: the VAE's; its scaling factor says how large latents are. Each `[1, channels, 16, 24]`, float32.
    """
    generator, channels = torch.Generator().manual_seed(65504), int(config["latent_channels"])
    noise = torch.randn(1, channels, *PROBE_LATENTS, generator=generator)
    smooth = nn.functional.interpolate(torch.randn(1, channels, 2, 3, generator=generator), PROBE_LATENTS)
    factor = float(config.get("scaling_factor", 1.0))
    return [field * strength / factor for field, strength in zip((noise, smooth), PROBE_STRENGTHS, strict=True)]


@contextlib.contextmanager
def kept_float(module: nn.Module, islands: Islands, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a module already cast to `dtype` computes its islands in float32, with casts at their edges.

    The casts are traced with the module, so that the exported graph has them. Weights of islands become float32; they
    must have been kept (see `float_weights`).
    """
    handles = []
    for path, block in blocks(module).items() if islands.reasons else ():
        own = torch.float32 if path in islands.reasons or type(block).__name__ == EXACT else dtype
        handles.append(block.register_forward_pre_hook(_cast_inputs(own), with_kwargs=True))
        if path in islands.reasons and path not in islands.overflowing:
            handles.append(block.register_forward_hook(_cast_output(dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast_inputs(dtype: torch.dtype) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    return hook


def _cast_output(dtype: torch.dtype) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, dtype)

    return hook


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dim() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(part, dtype) for part in value)
    return {key: _cast(part, dtype) for key, part in value.items()} if type(value) is dict else value


def float_weights(module: nn.Module, islands: Islands) -> dict[str, torch.Tensor]:
    """The islands' float32 weights by name, to be put back after the rest was cast."""
    return {
        name: value.detach()  # `to` gives a parameter other data; this keeps the old
        for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items()
        if any(name.startswith(f"{path}.") for path in islands.reasons)
    }
