"""Prompts longer than the text encoder reads: in parts where the UNet takes them, cut and said elsewhere."""

from __future__ import annotations

import random
import string
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from small_bundles import small_pipeline

from engines import load_pipeline
from engines.generate.drawing import Request, draw
from engines.generate.long_prompts import cut_lines, encode, limit_of, reading, token_ids
from sdkd.core.console import quiet

LONG = " ".join(["cat"] * 20 + ["dog"] * 20)  # 120 tokens, one for each letter


def request(parts: int) -> Request:
    """One image of the long prompt."""
    return Request((LONG,), "blurry", 32, 32, 2, 4.0, 0, 1, parts=parts)


def test_parts_are_the_prompt_cut_by_tokens_and_encoded_alone(eager: StableDiffusionPipeline) -> None:
    (ids,) = token_ids(eager, [LONG])
    limit = limit_of(eager)
    parts = -(-len(ids) // (limit - 2))
    found, pooled = encode(eager, [LONG, ""], parts)
    assert pooled is None  # of SDXL alone
    assert found.shape == (2, parts * limit, 32)
    tokenizer = eager.tokenizer
    for part in range(parts):
        piece = ids[part * (limit - 2) : (part + 1) * (limit - 2)]
        row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * (limit - len(row))
        alone = eager.text_encoder(torch.tensor([row]))[0]
        torch.testing.assert_close(found[:1, part * limit : (part + 1) * limit], alone, atol=1e-5, rtol=0)
    short = eager.encode_prompt("a cat", torch.device("cpu"), 1, False)[0]
    torch.testing.assert_close(encode(eager, ["a cat"], 1)[0], short, atol=1e-5, rtol=0)


def test_long_prompts_reach_engines_that_have_the_tokens(control_bundle: Path, eager: StableDiffusionPipeline) -> None:
    plugged = load_pipeline(control_bundle, "onnxruntime", controlnet=False)
    parts, lines = reading(plugged, [LONG, "a cat"], 32, 32)
    assert (parts, len(lines)) == (2, 1)
    assert "read in 2 parts of 77" in lines[0]
    pictures = [
        np.asarray(draw(pipe, request(parts), [0], quiet)[0], dtype=float)
        for pipe, parts in ((eager, 2), (plugged, 2), (eager, 1))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 1  # the end of the prompt counts


def test_what_is_cut_is_said(engine_bundle: Path) -> None:
    plugged = load_pipeline(engine_bundle, "onnxruntime")
    (ids,) = token_ids(plugged, [LONG])
    parts, lines = reading(plugged, [LONG, "a cat", ""], 32, 32)
    assert parts == 1
    lost = plugged.tokenizer.decode(ids[75:]).strip()
    assert lost
    assert lines == cut_lines(plugged, [LONG, LONG])
    assert f"has {len(ids)} tokens, 75 can be read" in lines[0]
    assert "--tokens, such as 77..154" in lines[0]
    assert lines[0].endswith(f"Cut off: {lost!r}")


def test_short_plain_texts_are_known_to_fit() -> None:
    """So much is said without a tokenizer: none of them has more tokens than characters."""
    pipe, chance = small_pipeline(), random.Random(0)
    texts = ["".join(chance.choices(string.printable, k=75)) for _ in range(50)]
    texts = [text.replace("<", "") for text in texts]
    assert max(len(ids) for ids in token_ids(pipe, texts)) <= 75
    assert reading(pipe, texts, 32, 32) == (1, [])
