"""Vocabulary pruning: a smaller head for the tokens a corpus uses; every text can still be encoded.

The bytes, the special tokens and the most frequent tokens of a byte-level BPE are kept, and with a token everything it
is merged from. A word whose tokens are all kept is encoded as before, any other by smaller tokens.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill.errors import UserError
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.model import Model
from distill.shapes import Params
from distill.tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A smaller tokenizer and the old ids of its tokens."""

    tokenizer: TextTokenizer
    ids: np.ndarray
    """``[size]`` int32: the old id of every new one, ascending."""


def prune(tokenizer: TextTokenizer, corpus: Iterable[str], size: int | None = None) -> Pruned:
    """The tokenizer with the tokens a corpus uses, the most frequent first.

    Args:
      tokenizer: a byte-level BPE.
      corpus: texts.
      size: most tokens to keep; None: all that occur.

    Raises:
      UserError: another kind of tokenizer, or a size below what must be kept (bytes and special tokens).
    """
    return prune_by(tokenizer, collections.Counter(i for text in corpus for i in tokenizer.encode(text)), size)


def prune_by(tokenizer: TextTokenizer, uses: Mapping[int, int], size: int | None = None) -> Pruned:
    """``prune`` by how often each id occurs.

    Raises:
      UserError: as ``prune``.
    """
    file = json.loads(tokenizer.serialized)
    if file["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(file.get("pre_tokenizer")):
        raise UserError(f"prune: a tokenizer of kind {file['model']['type']}; expected a byte-level BPE.")
    vocabulary: dict[str, int] = file["model"]["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in file["model"]["merges"]]
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    named = {tokenizer.eos, tokenizer.bos, tokenizer.pad, tokenizer.unknown, file["model"].get("unk_token")}
    named |= set(tokenizer.stops)
    added = {token["content"] for token in file["added_tokens"]}
    kept = added | {token for token in named if token is not None} | {t for t in vocabulary if len(t) == 1}
    if size is not None and size < len(kept):
        raise UserError(f"prune: size={size}; bytes and special tokens alone are {len(kept)}.")
    names = {i: token for token, i in tokenizer.ids().items()}
    for i, _ in sorted(uses.items(), key=lambda item: (-item[1], item[0])):
        wanted = kept | made_of(names[i], ranks)
        if size is None or len(wanted) <= size:
            kept = wanted
    return _rebuild(tokenizer, file, merges, kept)


def made_of(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """A token and all it is merged from, as the BPE does it.

    Example:
      >>> sorted(made_of("abc", {("a", "b"): 0, ("ab", "c"): 1}))
      ['a', 'ab', 'abc', 'b', 'c']
    """
    parts, seen = list(token), {token, *token}
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks) + 1), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank > len(ranks):
            break  # no merges lead to it
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen


def _rebuild(tokenizer: TextTokenizer, file: dict[str, Any], merges: list, kept: set[str]) -> Pruned:
    old = {token: i for token, i in tokenizer.ids().items() if token in kept}
    new = {token: number for number, token in enumerate(old)}  # in the order of the old ids
    vocabulary = file["model"]["vocab"]
    file["model"]["vocab"] = {token: i for token, i in new.items() if token in vocabulary}
    file["model"]["merges"] = [list(m) for m in merges if m[0] in new and m[1] in new and m[0] + m[1] in new]
    for token in file["added_tokens"]:
        token["id"] = new[token["content"]]
    file["post_processor"] = _renumbered(file.get("post_processor"), new)
    smaller = dataclasses.replace(tokenizer, serialized=json.dumps(file, ensure_ascii=False))
    return Pruned(smaller, np.fromiter(old.values(), np.int32))


def _renumbered(value: Any, new: dict[str, int]) -> Any:
    """A post-processor with the new ids of its tokens."""
    if isinstance(value, dict):
        value = {key: _renumbered(inner, new) for key, inner in value.items()}
        return (
            value | {"ids": [new[token] for token in value["tokens"]]} if {"ids", "tokens"} <= value.keys() else value
        )
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return [value[0], new[value[0]]]
    return [_renumbered(inner, new) for inner in value] if isinstance(value, list) else value


def prune_model(model: Model, params: Params, ids: np.ndarray) -> tuple[Model, Params]:
    """A decoder with only these rows of its embedding and head; their logits are unchanged.

    Args:
      model: a decoder.
      params: its parameters.
      ids: ``[size]`` old ids (``Pruned.ids``).

    Raises:
      UserError: no decoder, or an id it has no row for.
    """
    config = model.config
    if not isinstance(config, DecoderConfig):
        raise UserError(f"prune_model: a model with config {config!r}; expected a decoder.")
    ids = np.asarray(ids)
    if not len(ids) or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(f"prune_model: ids outside 0 … {config.vocab_size - 1}, the rows of the embedding, or none.")
    axes = {"embedding": 0, "head": -1}
    cut = {name: jnp.take(params[name], ids, axis=axis) for name, axis in axes.items() if name in params}
    return decoder(dataclasses.replace(config, vocab_size=len(ids))), {**params, **cut}


def report(tokenizer: TextTokenizer, pruned: Pruned, texts: Iterable[str]) -> str:
    """One line: tokens kept, how much smaller the head is, and how much longer texts become."""
    texts = list(texts)
    before, after = (sum(map(len, one.encode_all(texts))) for one in (tokenizer, pruned.tokenizer))
    rows = tokenizer.vocab_size
    return (
        f"{len(pruned.ids)} of {rows} tokens kept: the head is {rows / len(pruned.ids):.2f} times smaller; "
        f"{after} tokens instead of {before}, {after / before - 1:+.2%}"
    )
