"""The untrained parts of the demo teacher: a CLIP tokenizer for the captions' words, VAE, text encoder and UNet."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sdkd.toyworld.scenes import IMAGE_SIZE, caption, seen_scenes

TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": IMAGE_SIZE, "layers_per_block": 1,
    "block_out_channels": (16, 32, 64, 64), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 128, "projection_dim": 128, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": TOKENS, "hidden_act": "quick_gelu",
}  # fmt: skip
# The block types of SD 1.x. `attention_head_dim` is the NUMBER of heads here: every head is 16 wide.
UNET = {
    "sample_size": IMAGE_SIZE // 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (32, 64, 128, 128), "attention_head_dim": [2, 4, 8, 8], "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
NOISE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "steps_offset": 1,
}  # fmt: skip


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2's table, which CLIP uses)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(hidden))]


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`symbols` with every neighbouring `pair` joined."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token; the most frequent pair first, ties by alphabet."""
    split = {word: (*word[:-1], f"{word[-1]}</w>") for word in words}
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        split = {word: merge(symbols, merges[-1]) for word, symbols in split.items()}


def write_tokenizer(folder: Path, words: Counter[str]) -> Any:
    """A CLIP tokenizer with one token for each of `words`; any other text falls back to pieces and bytes."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words)
    letters = byte_alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def new_tokenizer(folder: Path) -> Any:
    """The tokenizer of the captions' words."""
    words = Counter(word for scene in seen_scenes() for word in caption(scene).replace(",", " ,").split())
    return write_tokenizer(folder, words)


def token_ids(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Token ids int64 [n, 77], padded as StableDiffusionPipeline pads."""
    batch = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return torch.as_tensor(batch.input_ids)


def new_vae() -> Any:
    """The untrained VAE."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE)


def new_denoiser(tokenizer: Any) -> torch.nn.ModuleDict:
    """The untrained text encoder and UNet, which are trained together."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **special, **TEXT)
    return torch.nn.ModuleDict({"text": CLIPTextModel(config), "unet": UNet2DConditionModel(**UNET)})
