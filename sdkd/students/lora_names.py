"""Names of LoRA weights: the styles in use, brought to the two that diffusers and the layer map know.

`unet.<module>.<weight>` (diffusers and PEFT) and `lora_unet_<module with underscores>.<weight>` (kohya). And the names
by which adapters of other kinds are known, which are no LoRA though their files look like one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdkd.errors import ModelError, an

_WRAPPERS = ("base_model.model.unet.", "base_model.model.", "unet.")  # of PEFT's own files, the longest first
_UNET_PARTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.")
# Old diffusers kept a LoRA in attention processors: ...attn1.processor.to_q_lora.down.weight
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")
# Adapters that a down and an up matrix do not describe, by what the names of their weights hold.
_OTHERS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"(^|[._])b?oft_",
    # IA3, GLoRA, VeRA, AdaLoRA, Tucker decomposition, trained scalars, biases, embedding layers, differences of
    # weights, textual inversions, Control-LoRA.
    "adapter of another kind": r"ia3_|\.on_input$|\.[ab][12]\.weight$|vera_lambda_|\.lora_E$|ranknum|\.lora_mid\."
    r"|\.scalar$|lora[\w.]*\.bias$|lora_embedding_[AB]|\.diff(_b)?$|\.[wb]_norm$|^bundle_emb\.|^lora_controlnet$",
}
_LDM = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")


def other_kind(names: Iterable[str]) -> str | None:
    """What a file of adapters is when it is no plain LoRA, for an error: "is a DoRA (...): ..."; None for a LoRA.

    To be asked of the names as the file has them: diffusers leaves out what it does not know.
    """
    names = list(names)
    found = {kind: name for kind, pattern in _OTHERS.items() for name in reversed(names) if re.search(pattern, name)}
    if not found:
        return None
    first = next(iter(found.values()))
    return (
        f"is {an(' and '.join(found))} (by {first!r}): only plain LoRA is taken, an up and a down matrix and alpha for "
        "each layer. Merge it into its model with the program that made it, and give that model"
    )


def common_name(key: str) -> str:
    """A weight's name in diffusers' or kohya's style; a text encoder's stays as it is.

    Raises ModelError for the names of the original Stable Diffusion code, whose LoRAs are of SDXL as a rule.
    """
    if key.startswith(_LDM):
        raise ModelError(
            f"the LoRA weight {key!r} is named as in the original code, which SDXL's LoRAs are: "
            "give a LoRA of SD 1.x/2.x, or load it with diffusers and save it with pipe.save_lora_weights first"
        )
    for wrapper in _WRAPPERS:
        if key.startswith(wrapper) and key.removeprefix(wrapper).startswith(_UNET_PARTS):
            key = key.removeprefix(wrapper)
            break
    if not key.startswith(_UNET_PARTS):
        return key
    key = _PROCESSOR.sub(lambda found: f".to_{found[1]}{'.0' if found[1] == 'out' else ''}.lora.", key)
    # One style for all weights: of a file with both, diffusers would load those of the first alone.
    return "unet." + key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def remap_settings(settings: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a LoRA file (`unet.r`, `unet.rank_pattern`, ...) for a student.

    `modules` maps names of the student's modules to the teacher's; per-module entries follow it, those of removed
    modules are left out.
    """
    found = dict(settings)
    if "unet.lora_dropout" in found:
        found["unet.lora_dropout"] = 0.0  # it would stay switched on in diffusers
    for name in ("unet.rank_pattern", "unet.alpha_pattern"):
        if isinstance(found.get(name), Mapping):
            found[name] = {new: value for key, value in found[name].items() for new in _places(key, modules)}
    for name in ("unet.target_modules", "unet.exclude_modules"):
        if isinstance(found.get(name), list):
            found[name] = sorted({new for key in found[name] for new in _places(key, modules)})
    return found


def _places(key: str, modules: Mapping[str, str]) -> list[str]:
    """Where a module's entry goes: full names follow the map, short ones such as `to_q` stay."""
    bare = key.removeprefix("^")
    if not bare.startswith(_UNET_PARTS[:3]):
        return [key]
    mark = key[: len(key) - len(bare)]
    return [mark + own + bare.removeprefix(of) for own, of in modules.items() if f"{bare}.".startswith(f"{of}.")]
