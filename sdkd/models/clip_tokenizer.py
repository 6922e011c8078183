"""CLIP's own tokenizer, embedded: checkpoints in one file carry none, and it must not need a network.

`clip/merges.txt.gz` holds the 48,894 merges of OpenAI's byte-pair encoding; the vocabulary follows from them.
`tools/make_clip_tokenizer.py` makes the file, `clip/NOTICE` says where it is from.
"""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"
POSITIONS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407}
PADDING = {END: TOKENS["eos_token_id"], "!": 0}  # of SD 1.x, of SD 2.x


def token_limit(tokenizer: Any, positions: int | None) -> int:
    """Tokens that a prompt may have: the tokenizer's limit, but no more than the text encoder has positions for.

    A tokenizer saved without a limit says 1e30, which no tensor has room for.
    """
    return int(min(tokenizer.model_max_length, positions or POSITIONS))


def bounded(tokenizer: Any, positions: int | None) -> Any:
    """The tokenizer with the limit of `token_limit`: itself, or a copy."""
    limit = token_limit(tokenizer, positions)
    if tokenizer.model_max_length != limit:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = limit
    return tokenizer


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id: letters, letters that end a word, what each merge makes, start and end of text (49,408 in all)."""
    # A character stands for each byte: printable ones for themselves, first.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, START, END])}


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """The tokenizer of SD 1.x; with `pad_token` "!" (id 0), that of SD 2.x. Prompts have 77 positions."""
    from transformers import CLIPTokenizer

    text = gzip.decompress(MERGES.read_bytes()).decode()
    merges = text.splitlines()[1:]
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "vocab.json", Path(name) / "merges.txt"]
        files[0].write_text(json.dumps(vocabulary(merges)), encoding="utf-8")
        files[1].write_text(text, encoding="utf-8")
        return CLIPTokenizer(*map(str, files), model_max_length=POSITIONS, pad_token=pad_token)
