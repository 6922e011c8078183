"""Text encoder, VAE decoder and whole images: eagerly and on each target's engines, decoding at every size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_bench.bench import Bench
from gpu_bench.bundles import COMPONENTS, REST, TOKENS, built, each_target, graphs_of, opened
from gpu_bench.unets import EAGER, answer, exact_float32, parity, work_of

if TYPE_CHECKING:
    import torch

    from sdkd.compare import Subject

PROMPT = "a lighthouse in a storm"


class Parts:
    """The rows of text encoder and VAE, with eager float32's answers at the first size and the work of decoding."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.truths: dict[str, torch.Tensor] = {}
        self.work: dict[int, dict[str, int]] = {}

    def encoding(self, module: Any) -> Callable[[], torch.Tensor]:
        """A call of a text encoder on the same token ids for every way: its last hidden state."""
        import torch

        ids = torch.randint(module.config.vocab_size, (1, TOKENS.max), generator=torch.Generator().manual_seed(0))
        placed = ids.to(self.bench.device)
        return lambda: module(placed, return_dict=False)[0]

    def decoding(self, decoder: Any, size: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """A call of a VAE's decoder on the same latents for every way, one image."""
        import torch

        shape = latent_shape(decoder.config, size)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(size)).to(self.bench.device, dtype)
        return lambda: decoder.decode(latents, return_dict=False)[0]

    def rows(self, component: str, module: Any, way: str) -> None:
        """Decoding at every size, of a VAE; the distance to float32 where that is there."""
        call = self.encoding
        if component == "vae_decoder":
            call = partial(self.decoding, size=self.bench.settings.sizes[0], dtype=self.bench.dtype)
            for size in self.bench.settings.sizes:
                with self.bench.record.part(f"{way}, {size} px"):
                    facts = {"work": self.work[size]} if size in self.work else {}
                    work = self.decoding(module, size, self.bench.dtype)
                    self.bench.row(work, "VAE decode", way, 1, size, **facts)
        if component in self.truths:
            parity(self.bench, way, component, call(module), self.truths[component])

    def eagerly(self) -> None:
        """PyTorch's own rows; fills in float32's answers, and the work of decoding by size."""
        import torch

        from sdkd.models.resolve import load_component

        bench, plain = self.bench, torch.nn.Module.to
        with bench.record.part("eager text encoder"):
            text = load_component(bench.name, "text_encoder").to(bench.device)
            with exact_float32():
                self.truths["text_encoder"] = answer(self.encoding(text))
            self.rows("text_encoder", plain(text, dtype=bench.dtype), "eager")
            del text
        vae = load_component(bench.name, "vae").to(bench.device)
        self.work = {size: decoding_work(bench.settings.precision, vae, size) for size in bench.settings.sizes}
        with exact_float32():
            call = self.decoding(vae, bench.settings.sizes[0], torch.float32)
            self.truths["vae_decoder"] = answer(call)
        self.rows("vae_decoder", plain(vae, dtype=bench.dtype).to(memory_format=torch.channels_last), EAGER)


def vae(bench: Bench) -> None:
    """Decoding one image at every size, and the distance of text encoder and VAE to float32: eagerly, on engines."""
    parts = Parts(bench)
    with bench.record.part("eager"):
        parts.eagerly()
    bench.begin()  # the eager modules are gone
    for target, graphs in each_target(bench):
        with bench.record.part(target):
            bundle = built(bench, graphs, target, *REST)
            for component, part in zip(REST, ("text_encoder", "vae"), strict=True):
                with opened(bench, bundle, target, part) as module:
                    parts.rows(component, module, target)


def latent_shape(config: Any, size: int) -> tuple[int, int, int, int]:
    """Of one image of that many pixels."""
    from sdkd.core.contract import vae_scale

    side = size // vae_scale(config)
    return 1, config["latent_channels"], side, side


def decoding_work(precision: str, decoder: Any, size: int) -> dict[str, int]:
    """FLOPs of decoding one image (a multiply-add is 2), and its least bytes: weights, latents, pixels once."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from sdkd.compare.measure.limits import element_bytes

    with torch.device("meta"):
        twin = type(decoder).from_config(decoder.config)
        latents = torch.empty(latent_shape(decoder.config, size))
    # Attention as plain products: the counter does not know the fused kernels of every device.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pixels = twin.decode(latents, return_dict=False)[0]
    used = [one for name, one in twin.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))]
    numbers = sum(one.numel() for one in (*used, latents, pixels))
    return {"flops": counter.get_total_flops(), "bytes": numbers * element_bytes(precision)}


def images(bench: Bench) -> None:
    """One image of the first size in all steps, with guidance; TensorRT with CUDA graphs and without."""
    from sdkd.compare import Subject

    precision = bench.settings.precision
    with bench.record.part("eager"):
        draw(bench, Subject("eager", bench.name, "eager", precision))
    for target, exported in each_target(bench):
        with bench.record.part(target):
            bundle = built(bench, exported, target, *COMPONENTS)
            for way, graphs in graphs_of(target).items():
                with bench.record.part(way):
                    draw(bench, Subject(way, bench.name, target, precision, bundle.path), graphs)


def draw(bench: Bench, subject: Subject, graphs: bool = True) -> None:
    """A row of one subject, whose memory counts from what the last one left; the pipeline is gone afterwards."""
    from sdkd.compare.measure.calls import Request, make_images
    from sdkd.compare.measure.subjects import close_subject, open_subject

    settings = bench.settings
    bench.begin()
    pipe: Any = open_subject(subject, bench.device)
    try:
        modules = [pipe.text_encoder, pipe.unet, pipe.vae] if subject.has_engines else []
        sessions = [session for module in modules for session in module.sessions()]
        bench.check_place(sessions)
        for session in () if graphs else sessions:  # a pipeline has no option for what its sessions can do without
            session._graphs.disable(session.checked.label, "this row is without them")
        request = Request((PROMPT,), settings.steps, 7.5, 0, settings.sizes[0])
        work = work_of(bench, pipe.unet.config, settings.batches[0], settings.sizes[0])
        facts = {"steps": settings.steps, "work": {name: value * settings.steps for name, value in work.items()}}
        bench.row(partial(make_images, pipe, request, 0), "image", subject.label, 1, settings.sizes[0], **facts)
    finally:
        close_subject(subject, pipe)
        del pipe
        bench.begin()
