"""Other projects' runtimes as subjects: our weights and noise, opened as their documentation says, by the same clock.

Most are given the ONNX files of a bundle. What they do not take is refused; nothing of theirs is replaced by ours.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sdkd.bundle.manifest import Bundle
from sdkd.core.components import CACHED_UNET
from sdkd.core.contract import check_precision
from sdkd.errors import BundleError, EngineError, InputError
from sdkd.models.schedulers import SCHEDULERS
from sdkd.targets.openvino_timesteps import HINTS

OWN_ENVIRONMENT = "so an environment of its own, with sdkd on PYTHONPATH"


class Shape(NamedTuple):
    """What a comparison asks of a subject in one call, for runtimes that compile for it."""

    images: int
    height: int
    width: int
    guided: bool


@dataclass(frozen=True)
class Peer:
    """Another project's runtime: what it imports, how it is opened, and what it is opened from.

    `opens`: "module:function" of (source, precision, device, shape) to a pipeline. `takes`: what the source is: a
    bundle, for its `graphs`; a `pipeline` in PyTorch; a model, for its `weights`. "module:function" `checks` a model.
    `precisions` that it computes in, from a bundle's graphs in float32; none: in that of the graphs. `schedulers` that
    it has, as `--scheduler` names them; none: diffusers' own. `notes`: what a report says of it.
    """

    name: str
    imports: str
    opens: str
    advice: str
    precisions: tuple[str, ...] = ()
    takes: Literal["graphs", "pipeline", "weights"] = "graphs"
    checks: str | None = None
    schedulers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def from_model(self) -> bool:
        """Whether it needs no bundle."""
        return self.takes != "graphs"


_HERE = __name__
PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "optimum", "optimum.onnxruntime:ORTStableDiffusionPipeline", f"{_HERE}:open_optimum",
            "it needs transformers older than 4.58, so an environment of its own: pip install 'sdkd[optimum]' there, "
            "or make interop in a checkout",
        ),
        Peer(
            "optimum-intel", "optimum.intel:OVStableDiffusionPipeline", f"{_HERE}:open_optimum_intel",
            f"it needs transformers older than 5.6, {OWN_ENVIRONMENT}: pip install optimum-intel there, without "
            "torchvision where torch is a CPU's",
            ("fp32", "bf16"),
        ),
        Peer(
            "openvino-genai", "openvino_genai:Text2ImagePipeline", "sdkd.compare.measure.genai:open_genai",
            "pip install openvino-genai, of openvino's version",
            ("fp32", "bf16"),
            checks="sdkd.compare.measure.foreign:check_plain",
            schedulers=("ddim", "pndm", "euler", "euler-a", "lcm"),
            notes=(
                "openvino-genai: loading contains the conversion of the ONNX files, and it cuts colours to eight bits "
                "where diffusers rounds: no image is nearer than about 53 dB",
            ),
        ),
        Peer(
            "torch-tensorrt", "torch_tensorrt:MutableTorchTensorRTModule", f"{_HERE}:open_torch_tensorrt",
            "pip install torch-tensorrt, of torch's version, beside an NVIDIA GPU",
            ("fp32", "fp16", "bf16"),
            takes="pipeline",
        ),
        Peer(
            "stable-diffusion-cpp", "stable_diffusion_cpp:StableDiffusion", "sdkd.compare.measure.sdcpp:open_sdcpp",
            "pip install stable-diffusion-cpp-python, which is built there: it needs a C++ compiler, and minutes",
            ("fp32", "fp16"),
            takes="weights",
            checks="sdkd.compare.measure.sdcpp:check_model",
            schedulers=("ddim", "euler"),
            notes=(
                "stable-diffusion-cpp: loading contains the conversion of the weights; its parts are timed as they "
                "pass by, the UNet step is one call for each half of the guidance; noise begins at sigma, not at "
                "sqrt(sigma^2 + 1) as in diffusers; brackets in prompts are weights",
            ),
        ),
    )
}  # fmt: skip


def peer_of(target: str) -> tuple[Peer, str] | None:
    """The peer that a target names, and the precision: `openvino-genai-bf16`; None for other targets.

    InputError for a precision that is unknown, or that this peer does not compute in.
    """
    for name in sorted(PEERS, key=len, reverse=True):
        if target == name:
            return PEERS[name], "fp32"
        if target.startswith(f"{name}-"):
            precision, known = check_precision(target.removeprefix(f"{name}-")), PEERS[name].precisions
            if precision not in known:
                words = " or ".join(known) or "what the graphs are in"
                raise InputError(f"target {target!r} is unknown: {name} computes in {words}: give {name!r}")
            return PEERS[name], precision
    return None


def peer_problem(peer: Peer) -> str | None:
    """Why a peer cannot be imported here, and what to do; None where it can."""
    try:
        pkgutil.resolve_name(peer.imports)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:  # lazy modules turn an ImportError into any
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{peer.imports.partition(':')[0]} cannot be imported ({said}); {peer.advice}"
    return None


def check_scheduler(peer: Peer, scheduler: Any) -> None:
    """InputError, which names those that it has, for a scheduler that a peer does not have."""
    kind = type(scheduler).__name__
    if peer.schedulers and kind not in {SCHEDULERS[name] for name in peer.schedulers}:
        *most, last = peer.schedulers
        raise InputError(
            f"{peer.name} has no {kind}: give --scheduler {', '.join(most)} or {last}, for all subjects, or leave "
            f"target {peer.name!r} out"
        )


def open_peer(peer: Peer, source: Any, precision: str, device: str, shape: Shape | None) -> Any:
    """A peer's pipeline of what it takes. EngineError without the peer."""
    if problem := peer_problem(peer):
        raise EngineError(f"target {peer.name!r} does not run here: {problem}")
    if not peer.from_model:
        check_graphs(peer, source)
    return pkgutil.resolve_name(peer.opens)(source, precision, device, shape)


def check_graphs(peer: Peer, bundle: Bundle) -> None:
    """BundleError for graphs that a peer cannot run: of step caching, or in half precision where it lowers them."""
    if CACHED_UNET in bundle.manifest.components:
        raise BundleError(
            f"{peer.name} does not run bundle {str(bundle.path)!r}, which was exported for step caching: it takes the "
            f"UNet's second output for the prediction; leave out target {peer.name!r}, or export without --step-caching"
        )
    own = bundle.component("unet").precision
    if peer.precisions and own != "fp32":
        raise BundleError(
            f"{peer.name} lowers graphs in float32 by itself, and those of bundle {str(bundle.path)!r} are in {own}: "
            "give a bundle that was exported in fp32"
        )


def open_optimum(bundle: Bundle, precision: str, device: str, shape: Shape | None) -> Any:
    """Optimum's pipeline of the bundle's ONNX files, as Optimum's documentation opens it."""
    import optimum.onnxruntime

    from sdkd.models.diffusers_folder import quiet_libraries

    provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    with quiet_libraries():
        kind = getattr(optimum.onnxruntime, f"ORT{bundle.family.by_channels[4]}")
        return kind.from_pretrained(str(bundle.path), provider=provider)


def open_optimum_intel(bundle: Bundle, precision: str, device: str, shape: Shape | None) -> Any:
    """Optimum's pipeline on OpenVINO of the bundle's ONNX files, for one shape where it is guided: its fastest way."""
    import optimum.intel

    from sdkd.models.diffusers_folder import quiet_libraries

    with quiet_libraries():
        kind = getattr(optimum.intel, f"OV{bundle.family.by_channels[4]}")
        pipe = kind.from_pretrained(
            str(bundle.path), from_onnx=True, compile=False, ov_config=openvino_options(precision)
        )
        if shape is not None and shape.guided:
            size = {"height": shape.height, "width": shape.width}
            pipe.reshape(batch_size=1, num_images_per_prompt=shape.images, **size)
        pipe.compile()
    return pipe


def openvino_options(precision: str) -> dict[str, str]:
    """What OpenVINO is told: the precision, since a CPU with bf16 units takes that by itself, and one call at once."""
    return {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}


def open_torch_tensorrt(pipe: Any, precision: str, device: str, shape: Shape | None) -> Any:
    """A pipeline in PyTorch whose UNet Torch-TensorRT compiles at its first call (MutableTorchTensorRTModule)."""
    import torch_tensorrt

    pipe.unet = torch_tensorrt.MutableTorchTensorRTModule(pipe.unet, use_explicit_typing=True, immutable_weights=False)
    return pipe
