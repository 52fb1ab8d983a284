"""Published models with their tokenizers, by path or name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from distill import fetch
from distill.errors import UserError
from distill.models.config import EncoderConfig
from distill.models.model import Model
from distill.shapes import Params
from distill.tokenizer import TextTokenizer
from distill.weights import folder, gguf, gguf_tokenizer


class Published(NamedTuple):
    """A model, its parameters, its tokenizer."""

    model: Model
    params: Params
    tokenizer: TextTokenizer


def read(
    name: str,
    *,
    dtype: Any = np.float32,
    activations: Literal["float32", "bfloat16"] = "float32",
    sharding: Callable[[Model], Any] | None = None,
) -> Published:
    """Reads a model and its tokenizer; ids without a token get no logit.

    Args:
      name: of ``fetch.MODELS``, a Hugging Face folder, a run folder (its student), a GGUF file, or a name on the hub.
      dtype: as ``load``.
      activations: as ``load``.
      sharding: as ``load``.

    Raises:
      MissingFile: nothing there.
      UserError: not supported, an encoder, or more tokens than the embedding has rows.
    """
    path = located(name)
    options = {"dtype": dtype, "activations": activations, "sharding": sharding}
    model, params = folder.load(path, **options)
    if isinstance(model.config, EncoderConfig):
        raise UserError(f"{name}: an encoder, which writes no text; expected a language model, such as a Llama.")
    try:
        tokenizer = _tokenizer_at(path).within(model.vocab_size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return Published(model.with_vocabulary(tokenizer.vocab_size), params, tokenizer)


def located(name: str) -> Path:
    """The path of the files, downloaded if necessary."""
    if name in fetch.MODELS:
        return fetch.fetch(fetch.MODELS[name])
    path = folder.located(name)
    return path if path.exists() else folder.download(name)


def _tokenizer_at(path: Path) -> TextTokenizer:
    if path.suffix == ".gguf":
        return gguf_tokenizer.text_tokenizer(gguf.GGUFSource(path))
    return TextTokenizer.from_folder(path)
