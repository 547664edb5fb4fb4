"""Encoded texts as a condition: embeddings of tokens, a mask, and whatever else a text encoder gives per text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition

# (B, N, E) floats, and (B, N), 1 for a token; others, such as pooled (B, P), keep their names
EMBEDDINGS, MASK = "embeddings", "mask"
_LENGTHS = "lengths"  # in files, instead of a mask: number of tokens of every text
_OLDER = {"captions": EMBEDDINGS, "caption_mask": MASK}  # names in files of earlier versions
NAMES = (EMBEDDINGS, MASK, _LENGTHS, *_OLDER)  # that a file may have


def text_table(tensors: Mapping[str, Tensor]) -> Condition:
    """The table of K texts, by label, from tensors of K + 1 rows whose last one is the null text.

    embeddings (K + 1, N, E), or with more axes behind the tokens; mask (K + 1, N) or lengths (K + 1,), or neither without padding;
    other tensors with a row per text. Returns views, so rows of a mapped file are read when they are indexed. Raises ValueError
    where shapes do not fit or a text has no token.
    """
    named = {_OLDER.get(name, name): tensor for name, tensor in tensors.items()}
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items()) or "nothing"
    embeddings = named.get(EMBEDDINGS)
    if embeddings is None or embeddings.ndim < 3 or not embeddings.is_floating_point() or len(embeddings) < 2:
        wanted = "floats embeddings (K + 1, tokens, channels), the null text last"
        raise ValueError(f"encoded texts are {wanted}; got {shapes}")
    if _LENGTHS in named:
        lengths = named.pop(_LENGTHS)
        named[MASK] = torch.arange(embeddings.shape[1]) < lengths.reshape(-1, 1)
    if not all(tensor.ndim and len(tensor) == len(embeddings) for tensor in named.values()):
        raise ValueError(f"encoded texts have one row per text in every tensor; got {shapes}")
    if MASK in named:
        mask = named[MASK]
        if mask.shape != embeddings.shape[:2] or not bool(mask.bool().any(dim=1).all()):
            raise ValueError(f"a mask of texts is (K + 1, tokens) with a token in every row; got {shapes}")
    null_row = {name: tensor[-1:] for name, tensor in named.items()}
    return Condition({name: tensor[:-1] for name, tensor in named.items()}, null_row)
