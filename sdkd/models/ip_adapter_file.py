"""Files of IP-Adapters, and what they make of a UNet: checked first, since diffusers goes by places of layers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdkd.core.files import sha256
from sdkd.errors import InputError, ModelError
from sdkd.models.diffusers_folder import quiet_libraries
from sdkd.models.ip_adapter import check_projections, image_prompts
from sdkd.models.safetensors_file import Weights

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."  # what the names of a file's weights begin with
_KEYS = "to_k_ip.weight"
_LAYERS = {f"to_{name}_lora": f"to_{name}{'.0' * (name == 'out')}" for name in ("q", "k", "v", "out")}


@dataclass(frozen=True)
class IpAdapter:
    """An IP-Adapter's file (an absolute path), and the file's SHA-256."""

    file: str
    sha256: str

    @staticmethod
    def of(path: str | Path) -> IpAdapter:
        """Of a .safetensors file; InputError for another, ModelError for one that is damaged or no IP-Adapter."""
        file = Path(path).expanduser().absolute()
        if file.suffix != ".safetensors" or not file.is_file():
            raise InputError(
                f"IP-Adapter {str(path)!r} is no .safetensors file here: give one, such as ip-adapter_sd15.safetensors "
                "(a .bin is a pickle, which can run code on loading)"
            )
        names = Weights.open(file).tensors
        if not all(any(name.startswith(start) for name in names) for start in (PROJECTION, ATTENTION)):
            raise ModelError(
                f"{str(file)!r} is no IP-Adapter: it has no weights named {PROJECTION}* and {ATTENTION}*, as those for "
                "diffusers have"
            )
        return IpAdapter(str(file), sha256(file))

    def read(self) -> dict[str, dict[str, Any]]:
        """Its weights as diffusers takes them: `image_proj` and `ip_adapter`, each by name."""
        tensors = Weights.open(Path(self.file)).tensors
        return {
            start[:-1]: {
                name.removeprefix(start): tensor.read() for name, tensor in tensors.items() if name.startswith(start)
            }
            for start in (PROJECTION, ATTENTION)
        }

    def check(self, unet: Any) -> None:
        """ModelError unless it has keys for all layers of this UNet's attention to the text, as wide as its text."""
        found = {name: tensor.shape for name, tensor in Weights.open(Path(self.file)).tensors.items()}
        keys = [shape for name, shape in found.items() if name.startswith(ATTENTION) and name.endswith(_KEYS)]
        layers = [name for name in unet.attn_processors if ".attn2." in name]
        if len(keys) != len(layers):
            raise ModelError(
                f"IP-Adapter {self.file!r} is for a UNet of {len(keys)} layers of attention to the text, and this one "
                f"has {len(layers)}: give one that was made for it (a student has other layers than its teacher)"
            )
        width = unet.config.cross_attention_dim
        if wrong := next((shape[1] for shape in keys if shape[1] != width), None):
            raise ModelError(
                f"IP-Adapter {self.file!r} is for a UNet whose text is {wrong} wide, and this one's is {width}: give "
                "one of its family (SD 1.x, SDXL)"
            )


def add_to(unet: Any, adapters: Sequence[IpAdapter]) -> Any:
    """Load IP-Adapters into a UNet2DConditionModel, as diffusers does, in place; FaceID's LoRAs go into its weights.

    Returns the module. Raises ModelError for one that does not fit it, or whose projection is none of those above.
    """
    if not adapters:
        return unet
    if image_prompts(unet):
        raise InputError("this UNet has an IP-Adapter already: give files, or a pipeline that has one loaded")
    for adapter in adapters:
        adapter.check(unet)
    states = [adapter.read() for adapter in adapters]
    names = list(unet.attn_processors)
    try:
        with quiet_libraries():
            unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        files = ", ".join(adapter.file for adapter in adapters)
        raise ModelError(f"IP-Adapter {files}: diffusers cannot load it into this UNet ({reason}): check it") from error
    check_projections(unet)
    for state in states:
        _fuse_loras(unet, names, state["ip_adapter"])
    return unet.eval().requires_grad_(False)


def _fuse_loras(unet: Any, names: Iterable[str], state: Mapping[str, Any]) -> None:
    """Add FaceID's LoRAs to the attention that they are for; their scale is 1, as diffusers loads them."""
    for number, name in enumerate(names):
        for own, layer in _LAYERS.items():
            if (down := state.get(f"{number}.{own}.down.weight")) is not None:
                weight = unet.get_submodule(f"{name.removesuffix('.processor')}.{layer}").weight
                change = state[f"{number}.{own}.up.weight"].float() @ down.float()
                weight.data += change.to(weight.dtype)
