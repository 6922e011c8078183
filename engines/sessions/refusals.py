"""What engine modules refuse, and why: names that diffusers' and transformers' modules have, and engines have not."""

from __future__ import annotations

from sdkd.errors import EngineError

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
    "add_adapter": "adapters are added with pipe.load_lora_weights",
    "load_lora_adapter": "adapters are added with pipe.load_lora_weights",
    "_load_ip_adapter_weights": "IP-Adapter's projections and attention are not exported",
}
UNSETTABLE = {
    "_hf_hook": "cannot be offloaded: its weights live inside the engine. Leave out enable_model_cpu_offload / "
    "enable_sequential_cpu_offload (low_memory=True opens engines in turn)",
    "_diffusers_hook": f"takes no hooks of diffusers (layerwise casting, caching, group offloading): {LAYERS}",
    "forward": f"keeps its own forward: {_PATCH}. Leave it out",
    "_tome_info": f"takes no token merging: {_PATCH}. Leave it out",
    "__class__": f"keeps its class: {_PATCH}. Leave it out",
}
COPIES = "cannot be copied or pickled, since its engine is open in this process"


class UnreachableError(EngineError, AttributeError):
    """What an engine module does not have; also an AttributeError, so that `hasattr` says no."""
