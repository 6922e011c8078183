"""Train the demo's small VAE from the embedded one, and measure it -> sdkd/demo/small_vae, benchmarks/demo-decoder.

    OMP_NUM_THREADS=1 python tools/train_demo_decoder.py --work artifacts/demo-decoder
    python tools/train_demo_decoder.py --measure         # only measure the one that is packed

The run is that of `sdkd vae-distill` with the settings below, on the demo's drawings of scenes that may be trained on;
--work keeps its checkpoints, and the same command goes on from them. Likeness is measured on drawings of scenes that
nothing is trained on: on images that both decoders make of the same latents, and on latents of both encoders. Captions
are judged on what the embedded teacher draws with either VAE, from the same noise.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdkd.compare.measure.quality import image_likeness
from sdkd.core.files import new_folder, read_json, write_json
from sdkd.distill.data.buckets import fit_pixels
from sdkd.distill.data.encode import encode_image
from sdkd.distill.training.log import LOG
from sdkd.distill.training.samples import joined
from sdkd.distill.vae.config import vae_config
from sdkd.distill.vae.run import VaeJob, run
from sdkd.distill.vae.trainer import decode
from sdkd.models.replacements import DEMO_VAE, load_replacement
from sdkd.models.resolve import load_component, load_eager
from sdkd.toyworld.reader import evaluate_captions
from sdkd.toyworld.scenes import IMAGE_SIZE, DemoImages, sample_scenes, seen_scenes

ROOT = Path(__file__).parent.parent
SMALL_VAE, BENCHMARK = DEMO_VAE, ROOT / "benchmarks" / "demo-decoder"
SETTINGS: dict[str, Any] = {
    "width": 16, "blocks": "6,6,3", "losses": "mse=4,l1=0.5,coarse=0.5,edges=1", "steps": 5000,
    "batch_size": 8, "learning_rate": 2e-3, "warmup": 100,
    "betas": (0.9, 0.99), "max_images": 6000, "latents": "memory", "device": "cpu", "workers": 0,
    "save_every": 1000, "log_every": 50,
}  # fmt: skip
COMMAND = "python tools/train_demo_decoder.py --work artifacts/demo-decoder"
JUDGED, SHOWN = 256, 8  # held-out drawings
SEEN = 200  # captions
ATTRIBUTES = ("shape", "colour", "background", "size")


def pil(pixels: torch.Tensor) -> Any:
    """Pixels [1, 3, h, w] in [-1, 1] as diffusers' pipelines make an image of them."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor().postprocess(pixels, output_type="pil")[0]


def macs(call: Any) -> int:
    """Multiply-accumulates of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops() // 2)


def costs(full: Any, small: Any) -> dict[str, Any]:
    """Parameters and MACs of one image of the demo's size, both ways."""
    latents, pixels = torch.zeros(1, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {
        name: {
            "decoder_parameters": sum(p.numel() for p in vae.decoder.parameters()),
            "encoder_parameters": sum(p.numel() for p in vae.encoder.parameters()),
            "decoder_macs": macs(lambda vae=vae: vae.decode(latents)),
            "encoder_macs": macs(lambda vae=vae: vae.encode(pixels)),
        }
        for name, vae in (("full", full), ("small", small))
    }


def measure(full: Any, small: Any, folder: Path) -> dict[str, Any]:
    """PSNR and SSIM of decoded images, and PSNR of what the full VAE decodes from either encoder's latents; a picture
    of the first drawings, each with the full decoder's image and the small one's.
    """
    drawn = DemoImages(JUDGED, held_out=True)
    decoded, encoded, pictures = [], [], []
    for index in range(len(drawn)):
        image = drawn[index]["image"]
        pixels = fit_pixels(image, IMAGE_SIZE, IMAGE_SIZE)
        latents, own = encode_image(full, pixels)[0][None], encode_image(small, pixels)[0][None]
        wanted, made = pil(decode(full, latents)), pil(decode(small, latents))
        decoded.append(image_likeness(made, wanted))
        encoded.append(image_likeness(pil(decode(full, own)), wanted))
        pictures += [image, wanted, made] if index < SHOWN else []
    joined(pictures).save(folder / "samples.png")
    psnr = np.array([one.counted_db for one in decoded])
    return {
        "images": len(drawn),
        "psnr_mean_db": float(psnr.mean()),
        "psnr_min_db": float(psnr.min()),
        "ssim_mean": float(np.mean([one.ssim for one in decoded])),
        "ssim_min": float(np.min([one.ssim for one in decoded])),
        "encoder_psnr_mean_db": float(np.mean([one.counted_db for one in encoded])),
    }


def captions_right(full: Any, small: Any) -> dict[str, dict[str, int]]:
    """Of SEEN captions, how many images by the teacher show each attribute as asked, with either VAE."""
    pipe = load_eager("demo")
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for name, vae in (("full", full), ("small", small)):
        pipe.vae = vae
        right = evaluate_captions(pipe, sample_scenes(seen_scenes(), SEEN, seed=0)).right
        found[name] = {attribute: right[attribute] for attribute in ATTRIBUTES}
    return found


def train(work: Path, steps: int) -> int:
    """Train, and pack in half precision; CPU seconds of the run."""
    config = vae_config(**SETTINGS | {"steps": steps})
    start = time.process_time()
    found = run(
        VaeJob("demo", "demo", work, config, resume="auto", command=COMMAND),
        lambda message, fraction: print(message, flush=True) if "step" in message else None,
    )
    seconds = time.process_time() - start
    with new_folder(SMALL_VAE, overwrite=True) as folder:
        load_replacement("vae", str(work), torch.float16).save_pretrained(folder)
        shutil.copy(work / "README.md", folder)
        write_json(folder / "sdkd.json", {key: value for key, value in found.items() if key not in ("output", "first")})
    for file in SMALL_VAE.iterdir():
        file.chmod(0o644)
    BENCHMARK.mkdir(exist_ok=True)
    shutil.copy(work / LOG, BENCHMARK)
    return math.ceil(seconds)


def main() -> None:
    """Train and pack, then measure what was packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="folder of the run and its checkpoints")
    what.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    args = parser.parse_args()
    result = BENCHMARK / "likeness.json"
    seconds = read_json(result)["cpu_seconds"] if args.measure else train(args.work, args.steps)
    full, small = load_component("demo", "vae"), load_replacement("vae", "demo", torch.float32)
    found = measure(full, small, BENCHMARK) | {"captions": SEEN, "captions_right": captions_right(full, small)}
    write_json(result, found | costs(full, small) | {"cpu_seconds": seconds})
    print(found)


if __name__ == "__main__":
    main()
