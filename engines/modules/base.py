"""What all engine modules share: a parameterless `nn.Module` with a config, a device and a dtype, as pipelines expect.

They are plain modules, not `ModelMixin`s: `DiffusionPipeline.from_pipe` hands a ModelMixin over only when its class is
exactly the one in the signature. Dtypes are cast once, at the edge: engines run in the bundle's precision, the pipeline
keeps its own.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch.func import functional_call

from engines.modules.carried import eager_tensors
from engines.sessions.base import COPIES, Rebuild, Session
from engines.sessions.ranges import signature
from engines.sessions.weights import EngineWeights, check_state
from sdkd.core.components import TEXT_ENCODERS
from sdkd.core.numbers import check_number
from sdkd.errors import EngineError

LORA_PARTS = ("unet", *TEXT_ENCODERS)  # parts whose weights adapters change, and other checkpoints
FIXED = "the engine's graph has no such input"
EAGERLY = "run eagerly: engines.unplug(pipe), where it was plugged with keep_eager=True"
# Why what an eager module has, or takes, is out of reach.
LAYERS = "the layers of an engine cannot be reached or changed"
_FREEU = "FreeU scales features between layers, and the engine's graph has none of it"
_ATTENTION = "an engine's attention is fixed when it is built"
_TOKENS = "the vocabulary of an engine is fixed when it is exported: textual inversion would add tokens"
_PATCH = "an engine does not run the layers that a patched forward pass (DeepCache, ToMe, hooks) would change"
UNREACHABLE = {
    **dict.fromkeys(("enable_freeu", "disable_freeu"), _FREEU),
    **dict.fromkeys(("set_attn_processor", "set_default_attn_processor", "attn_processors"), _ATTENTION),
    **dict.fromkeys(("fuse_qkv_projections", "unfuse_qkv_projections"), _ATTENTION),
    **dict.fromkeys(("get_input_embeddings", "resize_token_embeddings", "set_input_embeddings"), _TOKENS),
    "enable_layerwise_casting": "an engine's precision is fixed when it is exported and built",
    **dict.fromkeys(("fuse_lora", "unfuse_lora"), "adapters are part of the engine's weights already"),
    "enable_lora_hotswap": "an engine takes adapters of any rank, one after the other",
    "_load_ip_adapter_weights": "IP-Adapters are part of the graph: export the model with --ip-adapter FILE",
}
UNSETTABLE = {
    "_hf_hook": "cannot be offloaded: its weights live inside the engine. Leave out enable_model_cpu_offload / "
    "enable_sequential_cpu_offload (low_memory=True opens engines in turn)",
    "_diffusers_hook": f"takes no hooks of diffusers (layerwise casting, caching, group offloading): {LAYERS}",
    "forward": f"keeps its own forward: {_PATCH}. Leave it out",
    "_tome_info": f"takes no token merging: {_PATCH}. Leave it out",
    "encoder_hid_proj": "keeps its IP-Adapters: without an image it draws as if there were none",
    "__class__": f"keeps its class: {_PATCH}. Leave it out",
}
_OPTIONS = {"cross_attention_kwargs['ip_adapter_masks']": f"{FIXED}: an IP-Adapter's masks are not exported"}
log = logging.getLogger(__name__)


class UnreachableError(EngineError, AttributeError):
    """What an engine module does not have; also an AttributeError, so that `hasattr` says no."""


def refuse(module: object, arguments: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """EngineError naming the first argument that is neither empty nor a mask of ones (compel's), with the way out."""
    for name, value in arguments.items():
        empty = value is None or value is False or (isinstance(value, Mapping | tuple | list) and not value)
        ones = name.endswith("attention_mask") and isinstance(value, torch.Tensor) and bool((value == 1).all())
        if not empty and not ones:
            raise EngineError(
                f"{type(module).__name__} cannot take {name}: {reasons.get(name, FIXED)}. Leave it out, or {EAGERLY}"
            )


def adapter_scale(module: object, options: Mapping[str, Any] | None) -> float:
    """The factor of adapters in `cross_attention_kwargs`; EngineError for anything else there, by name."""
    for name, value in (options or {}).items():
        if name != "scale":
            refuse(module, {f"cross_attention_kwargs[{name!r}]": value}, _OPTIONS)
    if not options or "scale" not in options:
        return 1.0
    check_number("cross_attention_kwargs['scale']", options["scale"])
    return float(options["scale"])


def run_split(session: Session, feeds: Mapping[str, torch.Tensor], limit: int | None = None) -> dict[str, torch.Tensor]:
    """Run a session, a batch larger than it was built for (or `limit`) in near-equal parts along the batch axis.

    Raises RangeError, from the session, for every other axis and for a part below the smallest built batch.
    """
    batched = session.contract.batched
    if not batched:
        return _run_fixed(session, feeds)
    parts = session.parts(signature(feeds), limit)
    if parts <= 1:
        return session.run(feeds)
    pieces = zip(*(feeds[name].tensor_split(parts) for name in batched), strict=True)
    results = [session.run({**feeds, **dict(zip(batched, piece, strict=True))}) for piece in pieces]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _run_fixed(session: Session, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a session of fixed shapes on any batch: in parts, the last row repeated where one is not full."""
    size = session.contract.inputs[0].axes[0]
    count = feeds[session.contract.inputs[0].name].shape[0]
    if not isinstance(size, int) or count in (0, size):
        return session.run(feeds)

    def part(tensor: torch.Tensor, start: int) -> torch.Tensor:
        rows = tensor[start : start + size]
        return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])]) if len(rows) < size else rows

    results = [
        session.run({name: part(tensor, start) if tensor.dim() else tensor for name, tensor in feeds.items()})
        for start in range(0, count, size)
    ]
    return {name: torch.cat([result[name] for result in results])[:count] for name in results[0]}


def cast_feeds(session: Session, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the dtypes of the session's contract."""
    return {spec.name: in_dtype(tensors[spec.name], spec.torch_dtype) for spec in session.contract.inputs}


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, not asked for where there is nothing to do, as in most calls: it takes its time."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class EngineModule(torch.nn.Module):
    """A parameterless module with a device and a dtype that follow `.to()`, as pipelines expect.

    `session` is its first engine, whose weights can change. `original` is the eager module that it stands for, kept for
    `unplug`, or None. With `falls_back` that module answers where the engine cannot.
    """

    place: torch.Tensor
    original: Any
    stands_for: Any  # the class of the eager module
    falls_back = False
    # Set where there are adapters: a copy of the eager module, without weights, that holds them, and what gives a
    # module those that it holds. See engines.lora.adapters.
    adapters: Any = None
    bring_back: Callable[[torch.nn.Module], None] | None = None

    def __init__(self, session: Session, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device,
                 original: torch.nn.Module | None = None) -> None:  # fmt: skip
        torch.nn.Module.__init__(self)  # not the next class's: ControlNetModel would draw a whole network at random
        self.session = session
        self.register_buffer("place", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._internal_dict = self.full_config(config)  # diffusers repairs old configs by replacing this attribute
        object.__setattr__(self, "original", original)  # no submodule: `.to()` and hooks must not reach it
        self.weights = EngineWeights(session)  # a forward pass begins with `weights.apply_pending()`
        self._announced: set[str] = set()
        self._eager: tuple[Any, dict[str, torch.Tensor]] = (None, {})  # see _eager_state

    def full_config(self, config: Mapping[str, Any]) -> Any:
        """A config of `stands_for`, with its defaults of today where an older config.json has no value."""
        parameters = inspect.signature(self.stands_for.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return FrozenDict(defaults | dict(config))

    @property
    def config(self) -> Any:
        """The component's configuration, as the eager module has it."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """The pipeline's dtype; the engine's own precision is in its contract."""
        return self.place.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline keeps its tensors."""
        return self.place.device

    def sessions(self) -> Iterable[Session]:
        """The opened engines of this module."""
        return (self.session,)

    def follow(self, before: object, rebuild: Rebuild | None, falls_back: bool = False) -> None:
        """Go on as the module that was in this place: weights that were swapped in, fallback, how engines are rebuilt.

        ModelError when such weights do not fit this engine.
        """
        engine = before if isinstance(before, EngineModule) else None
        self.falls_back = falls_back or (engine is not None and engine.falls_back)
        earlier = engine.session.rebuild if engine is not None else None
        for session in self.sessions():
            session.rebuild = rebuild or earlier
        if engine is not None and engine.weights.checkpoint:
            check_state(self.session, engine.weights.checkpoint)
            self.weights.use(engine.weights.checkpoint)

    def fall_back(self, error: EngineError, arguments: Mapping[str, Any], method: str = "forward") -> Any:
        """The eager module's answer to what the engine cannot do, announced once; `error` itself where not asked for.

        The engine's other weights and adapters count for it, too. Its dtype and device follow the pipeline's.
        """
        eager = self.original
        if not self.falls_back or eager is None:
            raise error
        if str(error) not in self._announced:
            self._announced.add(str(error))
            log.warning("%s: runs eagerly, as eager_fallback asks, since %s", type(self).__name__, error)
        if (eager.device, eager.dtype) != (self.device, self.dtype):
            eager.to(self.device, self.dtype)
        given = {name: value for name, value in arguments.items() if value is not None}
        if method != "forward":
            return getattr(eager, method)(**given)
        with own_adapters_off(eager):  # the engine's are in its weights, those that it took over as well
            return functional_call(eager, eager_names(eager, self._eager_state()), kwargs=given)

    def _eager_state(self) -> dict[str, torch.Tensor]:
        """The engine's other weights for the eager module, made once for each change of them, device and dtype."""
        key = (self.weights.version, self.device, self.dtype)
        if key != self._eager[0]:
            changed = self.weights.changed()
            self._eager = key, {name: tensor.to(self.device, self.dtype) for name, tensor in changed.items()}
        return self._eager[1]

    def close(self) -> None:
        """Release the engines; calling the module afterwards is an EngineError."""
        for session in self.sessions():
            session.close()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            reason = UNREACHABLE.get(name, LAYERS)
            raise UnreachableError(f"{type(self).__name__} has no {name!r}: {reason}; {EAGERLY}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in UNSETTABLE:
            raise EngineError(f"{type(self).__name__} {UNSETTABLE[name]}, or {EAGERLY}")
        super().__setattr__(name, value)

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """Its own modules, and the layers with adapters under their names, by which PEFT knows what it saves."""
        yield from super().named_modules(*arguments, **options)
        if self.adapters is not None:
            yield from ((path, layer) for path, layer in self.adapters.named_modules() if hasattr(layer, "lora_A"))

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:
        """Its own modules: diffusers scales the adapter layers that it finds here, and the engine's scale is one."""
        return (module for _, module in super().named_modules(remove_duplicate=remove_duplicate))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """EngineError: an engine takes other weights in another way."""
        raise EngineError(
            f"{type(self).__name__} has no parameters to load: its weights live inside the engine. Give other weights "
            "with engines.swap_weights(pipe, model)"
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save the eager module that is kept, with the weights that count now; EngineError where none is kept."""
        with self.as_eager() as eager:
            eager.save_pretrained(save_directory, **options)

    def check_kept(self) -> None:
        """EngineError unless an eager module is kept that can be saved in this one's place."""
        name, place = type(self).__name__, str(self.session.checked.bundle.path)
        if self.original is None:
            raise EngineError(
                f"{name} cannot be saved: its weights live in the engine of bundle {place!r}, and no eager module is "
                f"kept. Load that bundle again with engines.load_pipeline, or plug it with keep_eager=True"
            )
        if getattr(self.adapters, "peft_config", None):
            raise EngineError(
                f"{name} cannot be saved with adapters on it, which would be lost: call pipe.unload_lora_weights() "
                "first, and keep the adapters' own files"
            )

    @contextlib.contextmanager
    def as_eager(self) -> Iterator[Any]:
        """The kept eager module as `restore` gives it, until the block ends: then it has its own weights again."""
        self.check_kept()
        own = eager_tensors(self.original)
        kept = {name: own[name].detach().clone() for name in self.weights.checkpoint}
        try:
            yield self.restore()
        finally:
            fill(self.original, kept)

    def restore(self) -> Any:
        """The kept eager module as the pipeline is now: its device and dtype, swapped weights, adapters."""
        eager = self.original
        if eager is None:
            return None
        if (eager.device, eager.dtype) != (self.device, self.dtype):  # the pipeline was moved while plugged
            eager.to(self.device, self.dtype)
        fill(eager, self.weights.checkpoint)
        if self.bring_back is not None:
            self.bring_back(eager)
        return eager

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError(
            f"{type(self).__name__} {COPIES}: make another with engines.load_pipeline("
            f"{str(self.session.checked.bundle.path)!r}) or engines.plug, or share the engines: "
            "StableDiffusionImg2ImgPipeline.from_pipe(pipe)"
        )


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a module these weights, by plain name, in its own dtypes."""
    own = eager_tensors(module) if state else {}
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def eager_names(eager: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names that they have where a module carries adapters of its own."""
    wrapped = {path for path, layer in eager.named_modules() if "base_layer" in layer._modules}
    parts = {name: name.rpartition(".") for name in state}
    return {
        f"{parts[name][0]}.base_layer.{parts[name][2]}" if parts[name][0] in wrapped else name: tensor
        for name, tensor in state.items()
    }


@contextlib.contextmanager
def own_adapters_off(eager: torch.nn.Module) -> Iterator[None]:
    """Run an eager module without the adapters that it carries itself."""
    on: list[Any] = [layer for layer in eager.modules() if getattr(layer, "_disable_adapters", True) is False]
    try:
        for layer in on:
            layer._disable_adapters = True
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False
