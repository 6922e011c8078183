"""A genuine CLIPModel with fixed weights, small enough for a test, saved as a user's folder."""

from __future__ import annotations

from pathlib import Path

import helpers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

SIZE = 32


def small_clip(seed: int = 5) -> CLIPModel:
    """Embeddings of 16 numbers; images of 32x32 pixels in patches of 8."""
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=layers | {"vocab_size": 600, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513},
        vision_config=layers | {"image_size": SIZE, "patch_size": 8},
        projection_dim=16,
    )
    return helpers.fixed_weights(CLIPModel(config), seed)


def save_small_clip(folder: Path) -> Path:
    """Write model, tokenizer and image processor; returns the folder."""
    small_clip().save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPProcessor(image_processor=images, tokenizer=helpers.tiny_tokenizer()).save_pretrained(folder)
    return folder
