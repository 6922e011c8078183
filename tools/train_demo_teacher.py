"""Train the demo teacher from nothing on a CPU: tokenizer, VAE, text encoder and UNet -> sdkd/demo/weights.

    python tools/train_demo_teacher.py --work artifacts/demo-teacher --output sdkd/demo/weights

Each stage (images, vae, latents, unet, pack) keeps what it made in --work and goes on from there when it is run again.
Training that ends on --vae-steps / --unet-steps is repeatable; with --vae-minutes / --unet-minutes the learning rate
follows the clock instead, for machines that are shared. `--stages pack` packs the newest checkpoint at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_models import NOISE, TOKENS, new_denoiser, new_tokenizer, new_vae, token_ids

from sdkd.toyworld.scenes import IMAGE_SIZE, Scene, caption, render, seen_scenes

DRAWINGS = 3  # of each scene
SHAPE_WEIGHT = 2.0  # how much the shape counts, the background being 1
CROP_SHARE = 0.7  # how long the VAE learns from quarters of the images
KL, EMA, CAPTION_DROPOUT = 1e-4, 0.999, 0.1
# In the first part of the UNet's training most steps see the first tokens of a caption alone; the longest has 15.
SHORT_TOKENS, SHORT_SHARE, LONG_SHARE = 16, 0.65, 0.15
LOG_EVERY, SAVE_EVERY = 50, 250
BATCH = 32
TRAINED = {"vae": (8000, 2e-3), "unet": (8000, 8e-4), "decoder": (3000, 1e-3)}  # steps, and the highest learning rate


def save(path: Path, state: Any) -> None:
    """torch.save, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def log(args: argparse.Namespace, **record: Any) -> None:
    """Print a record, and append it to training.jsonl as one line of JSON."""
    line = json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()})
    print(line, flush=True)
    with (args.work / "training.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


# ---------------------------------------------------------------- images and latents


def draw(job: tuple[Scene, int]) -> np.ndarray:
    """One image, uint8 [64, 64, 3]."""
    return np.asarray(render(*job))


def make_images(args: argparse.Namespace) -> None:
    """images.npy: uint8 [scenes * drawings, 64, 64, 3], the drawings of a scene one after the other."""
    jobs = [(scene, seed) for scene in seen_scenes() for seed in range(DRAWINGS)]
    start = time.time()
    with multiprocessing.Pool(args.threads) as pool:
        np.save(args.work / "images.npy", np.stack(pool.map(draw, jobs, chunksize=256)))
    log(args, stage="images", count=len(jobs), seconds=time.time() - start)


def load_images(args: argparse.Namespace) -> torch.Tensor:
    """The drawings, uint8 [n, 3, 64, 64] in channels-last memory."""
    return torch.from_numpy(np.load(args.work / "images.npy")).permute(0, 3, 1, 2)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float() / 127.5 - 1


def make_latents(args: argparse.Namespace) -> None:
    """latents.pt: mean and std of each drawing's latents, float32 [n, 4, 8, 8], and the factor to std 1."""
    images, vae, start = load_images(args), new_vae().eval(), time.time()
    vae.load_state_dict(torch.load(args.work / "vae.pt")["model"])
    means, stds = [], []
    with torch.no_grad():
        for batch in images.split(256):
            posterior = vae.encode(to_pixels(batch)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
    mean, std = torch.cat(means), torch.cat(stds)
    factor = float(1 / (mean.var() + std.square().mean()).sqrt())
    save(args.work / "latents.pt", {"mean": mean, "std": std, "scaling_factor": factor})
    log(args, stage="latents", scaling_factor=factor, posterior_std=float(std.mean()), seconds=time.time() - start)


# ---------------------------------------------------------------- training


def rate(progress: float, warm_up: float = 0.04, decay_from: float = 0.5) -> float:
    """Learning rate as a share of its peak: linear warm-up, flat, then a cosine down to 1 %."""
    if progress < decay_from:
        return min(1.0, (progress + 1e-3) / warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - decay_from) / (1 - decay_from))))


Loss = Callable[[float], torch.Tensor]
"""A batch's loss, given the share of the training that is done."""


def training(name: str, model: torch.nn.Module, loss_of: Loss, args: argparse.Namespace, ema: Any = None) -> None:
    """Train `model` on `loss_of` until its steps or its minutes are over; goes on from the checkpoint NAME.pt."""
    steps, minutes = (getattr(args, f"{name}_{what}") for what in ("steps", "minutes"))
    peak = TRAINED[name][1]
    path = args.work / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=peak, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    step, spent, losses, start = 0, 0.0, [], time.time()
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        if ema:
            ema.load_state_dict(state["ema"])
        torch.manual_seed(args.seed + step)

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        save(path, {**state, "ema": ema.state_dict() if ema else None})

    seconds = spent
    while (progress := max(step / steps, seconds / 60 / minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(progress)
        loss = loss_of(progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ema:
            ema.step(model.parameters())
        step += 1
        losses.append(loss.item())
        seconds = spent + time.time() - start
        if step % LOG_EVERY == 0:
            loss_of_late = float(np.mean(losses))
            log(args, stage=name, step=step, loss=loss_of_late, rate=peak * rate(progress), seconds=round(seconds, 1))
            losses.clear()
        if step % SAVE_EVERY == 0:
            checkpoint()
    checkpoint()
    log(args, stage=name, step=step, finished=True, seconds=round(seconds, 1))


def batches(count: int) -> Iterator[torch.Tensor]:
    """Endless shuffled index batches over `count` items."""
    while True:
        yield from (batch for batch in torch.randperm(count).split(BATCH) if len(batch) == BATCH)


def train_decoder(args: argparse.Namespace) -> None:
    """More training of the VAE's decoder alone, which leaves the latents that the UNet learns from as they are."""
    train_vae(args, "decoder")


def train_vae(args: argparse.Namespace, name: str = "vae") -> None:
    """L1 and L2 on the pixels and a little KL (nats per latent number), the loss of a small AutoencoderKL."""
    images, vae = load_images(args), new_vae().to(memory_format=torch.channels_last)
    if name == "decoder":
        vae.load_state_dict(torch.load(args.work / "vae.pt")["model"])
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    order = batches(len(images))

    def loss_of(progress: float) -> torch.Tensor:
        pixels = to_pixels(images[next(order)])
        # A shape is a tenth of its image: without a weight the VAE learns the backgrounds first and the shapes late.
        shape = ((pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        near = torch.nn.functional.max_pool2d(shape, 7, 1, 3)  # with the outside of the edge, or notches fill up
        weight = 1 + SHAPE_WEIGHT * near / near.mean((1, 2, 3), keepdim=True)
        if name == "vae" and progress < CROP_SHARE:
            # Colours and edges are learnt from quarters of the images too, several times faster.
            top, left = torch.randint(0, IMAGE_SIZE // 2 + 1, (2,)).tolist()
            window = (..., slice(top, top + IMAGE_SIZE // 2), slice(left, left + IMAGE_SIZE // 2))
        else:
            window = (slice(BATCH // 3), ...)
        pixels, weight = pixels[window].contiguous(), weight[window] / weight[window].mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixels
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return (weight * (error.abs() + 0.5 * error.square())).mean() + KL * kl

    training(name, vae, loss_of, args)


def train_unet(args: argparse.Namespace) -> None:
    """Noise prediction on cached latents, text encoder included.

    Timesteps are drawn in proportion to the min-SNR-5 weights (https://arxiv.org/abs/2303.09556): the weighted loss at
    less variance.
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel, compute_snr

    cache, tokenizer = torch.load(args.work / "latents.pt"), new_tokenizer(args.work / "tokenizer")
    ids = token_ids(tokenizer, [caption(scene) for scene in seen_scenes()])
    empty = token_ids(tokenizer, [""])
    model = new_denoiser(tokenizer)
    ema = EMAModel(model.parameters(), decay=EMA, use_ema_warmup=True, power=3 / 4)
    scheduler = DDPMScheduler(**NOISE, clip_sample=False)
    snr = compute_snr(scheduler, torch.arange(1000))
    weights = snr.clamp(max=5) / snr
    order = batches(len(cache["mean"]))

    def loss_of(progress: float) -> torch.Tensor:
        chosen = next(order)
        mean, std = cache["mean"][chosen], cache["std"][chosen]
        latents = (mean + std * torch.randn_like(mean)) * cache["scaling_factor"]
        noise, timesteps = torch.randn_like(latents), torch.multinomial(weights, len(chosen), replacement=True)
        dropped = torch.rand(len(chosen), 1) < CAPTION_DROPOUT
        words = torch.where(dropped, empty, ids[chosen // DRAWINGS])
        # Attention to 77 tokens, most of them padding, is 40 % of a step: so most steps see only the first few.
        short = progress < SHORT_SHARE and torch.rand(()) >= LONG_SHARE
        text = model["text"](words[:, : SHORT_TOKENS if short else TOKENS])[0]
        predicted = model["unet"](scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        return (predicted - noise).square().mean()

    training("unet", model, loss_of, args, ema)


# ---------------------------------------------------------------- packing


def pack(args: argparse.Namespace) -> None:
    """The averaged weights as a StableDiffusionPipeline folder in half precision."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from sdkd.core.files import new_folder, read_json, write_json
    from sdkd.models.diffusers_folder import write_pipeline

    tokenizer, vae = new_tokenizer(args.work / "tokenizer"), new_vae()
    model, state = new_denoiser(tokenizer), torch.load(args.work / "unet.pt", weights_only=False)
    for parameter, average in zip(model.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    finished = args.work / "decoder.pt"
    vae.load_state_dict(torch.load(finished if finished.exists() else args.work / "vae.pt")["model"])
    vae.register_to_config(scaling_factor=torch.load(args.work / "latents.pt")["scaling_factor"])
    # Written anew so that no path of this machine is remembered in a config.
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = ""
    pipe = StableDiffusionPipeline(
        vae=vae, unet=model["unet"], text_encoder=model["text"], tokenizer=tokenizer, safety_checker=None,
        scheduler=DPMSolverMultistepScheduler(**NOISE, algorithm_type="dpmsolver++", solver_order=2),
        feature_extractor=None, requires_safety_checker=False,
    ).to(dtype=torch.float16)  # fmt: skip
    with new_folder(args.output) as folder:
        write_pipeline(pipe, folder)
        # transformers 5 loads in the dtype of this config, diffusers in float32: without a torch_dtype both must agree.
        config = read_json(folder / "text_encoder" / "config.json")
        write_json(folder / "text_encoder" / "config.json", {**config, "dtype": "float32"})
    for file in args.output.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    log(args, stage="pack", step=state["step"], megabytes=size / 1e6)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "images": make_images, "vae": train_vae, "latents": make_latents, "unet": train_unet, "decoder": train_decoder,
    "pack": pack,
}  # fmt: skip
MADE = {"images": "images.npy", "latents": "latents.pt"}  # a stage is skipped when this is there


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of checkpoints and caches")
    add("--output", type=Path, required=True, help="new folder for the finished pipeline")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count())
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast for the VAE")
    for name, (steps, _) in TRAINED.items():
        add(f"--{name}-steps", type=int, default=steps)
        add(f"--{name}-minutes", type=float, default=math.inf)
    return parser.parse_args()


def main() -> None:
    """Run the stages in order."""
    from sdkd.core.files import check_free

    args = arguments()
    check_free(args.output, overwrite=False)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for stage, run in STAGES.items():
        if stage in args.stages and not (stage in MADE and (args.work / MADE[stage]).exists()):
            torch.manual_seed(args.seed)
            run(args)


if __name__ == "__main__":
    main()
