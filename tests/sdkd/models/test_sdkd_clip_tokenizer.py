"""The embedded tokenizer is CLIP's: known ids, both ways of padding, and it survives being saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sdkd.models.clip_tokenizer import MERGES, clip_tokenizer

# Ids as CLIP's own tokenizer gives them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A  Photo, of\na cat": [320, 1125, 267, 539, 320, 2368],
    "": [],
    "!": [256],
    "1girl": [272, 1611],
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_ids(text: str) -> None:
    assert clip_tokenizer()(text).input_ids == [49406, *KNOWN[text], 49407]


def test_the_vocabulary() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer.convert_ids_to_tokens([0, 255, 256, 511, 512, 513, 49405]) == [
        "!", "Ń", "!</w>", "Ń</w>", "in", "th", "jekyll</w>",
    ]  # fmt: skip
    for text in ("日本語", "café 🐱 don't", "naïve Ωμέγα"):
        back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert back.replace(" ", "") == text.lower().replace(" ", "")


def test_padding_of_both_families(tmp_path: Path) -> None:
    for pad, token in ((49407, "<|endoftext|>"), (0, "!")):
        tokenizer = clip_tokenizer(token)
        ids = tokenizer("cat", padding="max_length").input_ids
        assert (len(ids), ids[:4]) == (77, [49406, 2368, 49407, pad])
        tokenizer.save_pretrained(tmp_path / str(pad))
        again = CLIPTokenizer.from_pretrained(tmp_path / str(pad))
        assert again("cat", padding="max_length").input_ids == ids


def test_the_licence_lies_beside_the_merges() -> None:
    notice = (MERGES.parent / "NOTICE").read_text(encoding="utf-8")
    assert "MIT License" in notice
    assert "Copyright (c) 2021 OpenAI" in notice
