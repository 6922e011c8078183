"""Prompts of more tokens than the text encoder reads at once: in parts, or cut, with a note.

A part is a start token, as much of the prompt as fits, and an end token; parts are encoded alone and joined along the
tokens, as compel and other front ends do. All prompts of a request get as many parts as the longest one needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdkd.models.clip_tokenizer import token_limit
from sdkd.models.conditioning import family_of, joined

if TYPE_CHECKING:
    import torch

MOST_PARTS = 8  # in PyTorch, where nothing else limits them
CLIP_TOKENS = 77
_SHOWN = 40  # characters of a prompt in a message


def limit_of(pipe: Any) -> int:
    """Tokens that the text encoder takes at once, start and end included."""
    positions = getattr(pipe.text_encoder.config, "max_position_embeddings", None) or CLIP_TOKENS  # Optimum has none
    return token_limit(pipe.tokenizer, positions)


def reading(pipe: Any, texts: Sequence[str], height: int, width: int) -> tuple[int, list[str]]:
    """In how many parts prompts are read for images of this size (pixels), and a line about each long one."""
    long = _long(pipe, texts)
    if not long:
        return 1, []
    limit = limit_of(pipe)
    needed = max(-(-len(ids) // (limit - 2)) for ids in long.values())
    parts = max((count for count in range(1, needed + 1) if count in _takes(pipe, limit, height, width)), default=1)
    return parts, [_said(pipe, text, ids, parts, limit) for text, ids in long.items()]


def cut_lines(pipe: Any, texts: Sequence[str]) -> list[str]:
    """What diffusers' own calls leave out of prompts, a line for each that is too long."""
    return [_said(pipe, text, ids, 1, limit_of(pipe)) for text, ids in _long(pipe, texts).items()]


def _long(pipe: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """The texts, each once, that the text encoder does not take at once, and their tokens."""
    limit = limit_of(pipe)
    kept = [text for text in dict.fromkeys(texts) if not _surely_fits(text, limit)]
    return {text: ids for text, ids in zip(kept, token_ids(pipe, kept), strict=True) if len(ids) > limit - 2}


def _surely_fits(text: str, limit: int) -> bool:
    """Whether that is known without a tokenizer: a token is at least one character of plain ASCII."""
    return text.isascii() and "<" not in text and len(text) <= limit - 2  # <...> may stand for several, if learnt


def _takes(pipe: Any, limit: int, height: int, width: int) -> Iterator[int]:
    """Numbers of parts that the UNet takes at this size."""
    session = getattr(pipe.unet, "session", None)
    if session is None:
        yield from range(1, MOST_PARTS + 1)
        return
    for profile in session.checked.record.profiles:
        if height in profile.height and width in profile.width:
            counts = range(1, profile.sequence.max // limit + 1)
            yield from (count for count in counts if count * limit in profile.sequence)


def token_ids(pipe: Any, texts: Sequence[str]) -> list[list[int]]:
    """All tokens of each text, without start and end."""
    if not texts:
        return []
    return _ids(pipe, pipe.tokenizer, texts)


def _ids(pipe: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    words = [pipe.maybe_convert_prompt(text, tokenizer) for text in texts]  # of textual inversion
    return tokenizer(words, truncation=False, add_special_tokens=False, verbose=False).input_ids


def _said(pipe: Any, text: str, ids: Sequence[int], parts: int, limit: int) -> str:
    name = f"prompt {text[:_SHOWN] + '...'!r} has {len(ids)} tokens"
    if len(ids) <= parts * (limit - 2):
        return f"{name}: read in {parts} parts of {limit}"
    lost = pipe.tokenizer.decode(list(ids[parts * (limit - 2) :])).strip()
    wider = f"; engines built with a wider --tokens, such as {limit}..{2 * limit}, take more"
    advice = wider if hasattr(pipe.unet, "session") else ""
    return f"{name}, {parts * (limit - 2)} can be read{advice}. Cut off: {lost!r}"


def encode(pipe: Any, texts: Sequence[str], parts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings `[texts, parts * limit, width]` of texts read in parts, in the text encoders' dtype and place.

    In families that pool the text also that of the first part, `[texts, width]`. Hidden states of several text encoders
    lie side by side, as diffusers has them.
    """
    import torch

    family, outputs = family_of(pipe), []
    for encoder in family.text_encoders:
        module = getattr(pipe, encoder.part)
        rows = torch.tensor(_rows(pipe, getattr(pipe, encoder.tokenizer), texts, parts), device=module.device)
        with torch.no_grad():
            outputs.append(module(rows, output_hidden_states=True) if family.hidden_states else module(rows))
    states, pooled = joined(family, outputs)  # [texts * parts, limit, width], [texts * parts, width]
    return states.reshape(len(texts), -1, states.shape[-1]), None if pooled is None else pooled[::parts]


def _rows(pipe: Any, tokenizer: Any, texts: Sequence[str], parts: int) -> list[list[int]]:
    """Token ids of every part of every text, padded."""
    limit, rows = limit_of(pipe), []
    for ids in _ids(pipe, tokenizer, texts) if texts else []:
        pieces = [ids[start * (limit - 2) : (start + 1) * (limit - 2)] for start in range(parts)]
        full = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
        rows += [[*row, *[tokenizer.pad_token_id] * (limit - len(row))] for row in full]
    return rows


def arguments(pipe: Any, prompts: list[str], negatives: list[str] | None, parts: int, guided: bool) -> dict[str, Any]:
    """What a pipeline call gets for its prompts, `negatives` one for each or none: the texts, or their embeddings where
    they are read in parts.
    """
    if parts == 1:
        return {"prompt": prompts, "negative_prompt": negatives}
    found = _embeddings(pipe, prompts, parts)
    if guided and negatives is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        found |= {f"negative_{name}": tensor.new_zeros(tensor.shape) for name, tensor in found.items()}
    elif guided:
        without = _embeddings(pipe, negatives or [""] * len(prompts), parts)
        found |= {f"negative_{name}": tensor for name, tensor in without.items()}
    return found


def _embeddings(pipe: Any, texts: Sequence[str], parts: int) -> dict[str, torch.Tensor]:
    states, pooled = encode(pipe, texts, parts)
    return {"prompt_embeds": states} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})
