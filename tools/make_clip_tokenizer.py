"""Make sdkd/models/clip/merges.txt.gz: the merges of OpenAI's CLIP tokenizer, out of the package open_clip_torch.

    pip download --no-deps open_clip_torch
    python tools/make_clip_tokenizer.py open_clip_torch-*.whl

The package's file holds 262,144 merges; CLIP uses the first 48,894 of them (49,408 tokens less 512 letters and the two
marks of start and end). The output has no time stamp: the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from pathlib import Path

from sdkd.models.clip_tokenizer import MERGES, vocabulary

SOURCE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
USED = 49_408 - 2 * 256 - 2
FIRST = ["i n", "t h", "a n", "r e", "a r"]


def main() -> None:
    """Read a wheel of open_clip_torch, write the merges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="open_clip_torch-<version>-py3-none-any.whl")
    wheel = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(SOURCE)).decode().splitlines()
    merges = lines[1 : USED + 1]
    if merges[:5] != FIRST or len(set(vocabulary(merges))) != USED + 514:
        raise SystemExit(f"{wheel} does not hold CLIP's merges (first line: {lines[0]!r})")
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    MERGES.parent.mkdir(exist_ok=True)
    MERGES.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{MERGES}: {len(merges)} merges, {MERGES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
