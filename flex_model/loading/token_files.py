"""Batches of token ids from files: text, ``.npy`` or ``.safetensors``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flex_model.errors import ConfigurationError

__all__ = ["TokenBatches", "Tokens", "read_tokens"]

_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class Tokens:
    """Sequences of one length.

    Attributes:
        ids: ``[sequences, length]``, int64.
        mask: true for real tokens, of the same shape; None where all are.
    """

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class TokenBatches:
    """One data-parallel rank's batches, as keyword arguments of a transformers model.

    The ranks' batches beside each other are the sequences in order. The last ones are smaller, and
    evenly spread; of sequences that are fewer than ranks then, none is used.

    Attributes:
        tokens: all ranks'.
        size: sequences of a batch on one rank.
        rank: which data-parallel rank, of
        ranks: so many.
        limit: batches at most.
    """

    tokens: Tokens
    size: int
    rank: int = 0
    ranks: int = 1
    limit: int | None = None

    def __len__(self) -> int:
        together = self.size * self.ranks
        whole, rest = divmod(len(self.tokens.ids), together)
        found = whole + (rest >= self.ranks)
        return min(found, self.limit) if self.limit is not None else found

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        together = self.size * self.ranks
        for number in range(len(self)):
            rows = range(len(self.tokens.ids))[number * together : (number + 1) * together]
            each, more = divmod(len(rows), self.ranks)
            start = rows.start + self.rank * each + min(self.rank, more)
            own = slice(start, start + each + (self.rank < more))
            batch = {_IDS: self.tokens.ids[own]}
            if self.tokens.mask is not None:
                batch[_MASK] = self.tokens.mask[own]
            yield batch

    @property
    def sequences(self) -> int:
        """How many all ranks use."""
        found = len(self.tokens.ids)
        used = min(found, len(self) * self.size * self.ranks)
        rest = used % (self.size * self.ranks)
        return used - rest if rest < self.ranks else used


def read_tokens(
    files: Sequence[Path], length: int | None, encode: Callable[[str], Sequence[int]]
) -> Tokens:
    """The sequences in some files, one file after the other.

    A stream of ids (a text's, or a tensor of one dim) is cut into sequences, and what is left over
    at its end is dropped. Rows of ids are taken as they are. A ``.safetensors`` file holds one
    tensor, or ``input_ids`` and perhaps ``attention_mask``.

    Args:
        files: text in UTF-8, unless their names end in ``.npy`` or ``.safetensors``.
        length: tokens of a sequence; None takes rows as long as they are, and no streams.
        encode: ids of a text.

    Raises:
        ConfigurationError: a file is missing, or something else; rows of another length; nothing.
    """
    found = [_read(path, length, encode) for path in files]
    if len({tokens.ids.shape[1] for tokens in found}) > 1:
        raise ConfigurationError(f"{[str(path) for path in files]} hold rows of several lengths.")
    if not sum(len(tokens.ids) for tokens in found):
        raise ConfigurationError(
            f"{[str(path) for path in files]} hold no sequence of {length} tokens. Give longer "
            "texts, or a smaller sequence."
        )
    masks = None
    if any(tokens.mask is not None for tokens in found):
        masks = torch.cat([
            tokens.mask if tokens.mask is not None else torch.ones_like(tokens.ids).bool()
            for tokens in found
        ])  # fmt: skip
    return Tokens(torch.cat([tokens.ids for tokens in found]), masks)


def _read(path: Path, length: int | None, encode: Callable[[str], Sequence[int]]) -> Tokens:
    try:
        if path.suffix == ".safetensors":
            return _of_tensors(path, load_file(path), length)
        if path.suffix == ".npy":
            return Tokens(_rows(path, torch.from_numpy(np.load(path)), length))
        ids = torch.tensor(encode(path.read_text(encoding="utf-8")), dtype=torch.int64)
        return Tokens(_rows(path, ids, length))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from error


def _of_tensors(path: Path, found: dict[str, Tensor], length: int | None) -> Tokens:
    name = _IDS if _IDS in found else next(iter(found), "")
    if not found or (name != _IDS and len(found) > 1):
        raise ConfigurationError(
            f"{path} holds {sorted(found)}. Give one tensor of token ids, or {_IDS!r}, and "
            f"{_MASK!r} if there is padding."
        )
    ids = _rows(path, found[name], length)
    if name != _IDS or _MASK not in found:
        return Tokens(ids)
    if found[_MASK].shape != found[_IDS].shape:
        raise ConfigurationError(
            f"{path}: {_MASK} has the shape {tuple(found[_MASK].shape)}, {_IDS} has "
            f"{tuple(found[_IDS].shape)}."
        )
    return Tokens(ids, _rows(path, found[_MASK].long(), length).bool())


def _rows(path: Path, ids: Tensor, length: int | None) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.ndim not in (1, 2):
        raise ConfigurationError(
            f"{path} holds {ids.dtype} of shape {tuple(ids.shape)}. Token ids are whole numbers, "
            "in a stream or in rows."
        )
    if ids.ndim == 1:
        if length is None:
            raise ConfigurationError(
                f"{path} holds a stream of {len(ids)} tokens. Tell how many make a sequence."
            )
        count = len(ids) // length
        ids = ids[: count * length].view(count, length)
    if length is not None and ids.shape[1] != length:
        raise ConfigurationError(
            f"{path} holds sequences of {ids.shape[1]} tokens, but sequence is {length}."
        )
    return ids.long()
