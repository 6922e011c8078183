"""PyTorch modules of a bundle, from the weights that its graphs keep by their state-dict names: no source is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import torch_weights
from sdkd.core.components import CACHED_UNET, CONFIG_FOLDERS
from sdkd.errors import BundleError
from sdkd.families import PIPELINES, family_of_pipeline
from sdkd.models.diffusers_folder import load_rest, quiet_libraries
from sdkd.models.families import empty, remade

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

_EXPORT = "export the model again"
PROMPTS, PROCESSOR = "encoder_hid_proj.", ".processor."  # in the names of an IP-Adapter's weights


def component_weights(bundle: Bundle, component: str) -> dict[str, torch.Tensor]:
    """A component's weights by state-dict name, float32, LoRAs that were fused among them; rounded where the graph is
    in half precision. Raises BundleError for a graph without names.
    """
    record = bundle.component(component)
    bundle.verify_files(record)
    file = bundle.path / record.files[0].path
    return {name: weight.float() for name, weight in torch_weights(file).items()}


def module_of(bundle: Bundle, part: str) -> Any:
    """A part with weights of a bundle in float32 on the CPU, in evaluation mode.

    A VAE of which one half was exported has that half alone; the other is left on the meta device. Raises BundleError
    where the graph lacks a weight by name.
    """
    halves = [name for name, folder in CONFIG_FOLDERS.items() if folder == part and name in bundle.manifest.components]
    halves = [name for name in halves if name != CACHED_UNET]
    if not halves:
        raise BundleError(f"bundle {str(bundle.path)!r} has no {part}: {_EXPORT}")
    index = bundle.json("model_index.json") if (bundle.path / "model_index.json").is_file() else {}
    kind = (*(index.get(part) or ()), None, None)[1]
    module = empty(part, bundle.config(halves[0]), kind)
    state = {name: tensor for half in halves for name, tensor in component_weights(bundle, half).items()}
    # Without an image a UNet with IP-Adapters is the plain one.
    state = {name: tensor for name, tensor in state.items() if not name.startswith(PROMPTS) and PROCESSOR not in name}
    found = module.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in found.missing_keys if part != "vae"]
    if missing or found.unexpected_keys:
        first = (missing or found.unexpected_keys)[0]
        raise BundleError(
            f"the {part} of bundle {str(bundle.path)!r} lacks weights by name (first: {first}): {_EXPORT}"
        )
    ready: torch.nn.Module = module.eval().requires_grad_(False)
    return ready


def pipeline_of(bundle: Bundle) -> StableDiffusionPipeline:
    """A bundle's pipeline in PyTorch, float32 on the CPU, with its own scheduler and tokenizer.

    Raises BundleError as `module_of`, and for a pipeline that is none of `sdkd.families.PIPELINES` (a ControlNet's).
    """
    kind = str(bundle.json("model_index.json").get("_class_name"))
    family = family_of_pipeline(kind)
    if family is None or kind not in PIPELINES:
        raise BundleError(
            f"bundle {str(bundle.path)!r} is of {kind}, which is not run in PyTorch: export the model without what "
            f"makes it that, for one of {', '.join(PIPELINES)}"
        )
    parts = {part: module_of(bundle, part) for part in family.parts}
    with quiet_libraries():
        pipe: StableDiffusionPipeline = remade(load_rest(bundle.path), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
