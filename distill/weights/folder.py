"""``load`` and ``save``: a Hugging Face folder, by its path or its name on the hub, as a model and its parameters."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distill.devices import processes
from distill.errors import MissingFile, UserError, shown
from distill.models.config import DecoderConfig, EncoderConfig, NetworkConfig
from distill.models.int8 import int8, quantizer
from distill.models.model import Model
from distill.progress import loading
from distill.shapes import Params
from distill.tokenizer import TextTokenizer
from distill.tokenizer.files import TEMPLATES, read_json
from distill.weights import gguf, gguf_tokenizer
from distill.weights.assemble import assemble
from distill.weights.families import FAMILIES, from_json, left_out, name_in, to_json
from distill.weights.families.family import Family
from distill.weights.families.gemma import text_of
from distill.weights.files import check, json_object
from distill.weights.networks import network, shapes_of, table_of, tensors
from distill.weights.place import Place
from distill.weights.replace import replacing, there
from distill.weights.safetensors import SafetensorsSource, is_weights, write
from distill.weights.table import Completed, Opened, Renamed

STUDENT = "student_hf"
"""Name of the folder in a run folder that holds the student, as ``save`` writes it."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
"""Files that are copied with a tokenizer, beside the folder ``TEMPLATES``; a save with one replaces them all."""

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(
    path_or_name: str | Path,
    *,
    dtype: Any = np.float32,
    activations: Literal["float32", "bfloat16"] = "float32",
    sharding: Callable[[Model], Any] | None = None,
    revision: str | None = None,
) -> tuple[Model, Params]:
    """A language model from a Hugging Face folder or a GGUF file.

    Args:
      path_or_name: a folder with ``config.json`` and safetensors, a run folder (its student), a ``.gguf`` file, or a
        name on the hub such as ``"Qwen/Qwen3-0.6B"``, downloaded once and kept in the hub's cache
        (``HF_HUB_OFFLINE=1``: from there only).
      dtype: of the parameters; None: as in the files; ``int8``: kernels of a decoder's layers quantised as
        in ``models.int8`` one after the other as they are read, everything else bfloat16.
      activations: type of activations and matmul operands.
      sharding: ``model -> tree of shardings`` like the parameters, such as
        ``lambda model: param_shardings(model, mesh)``; each parameter goes onto its devices as it is read.
      revision: branch, tag or commit on the hub.

    Returns:
      ``(model, params)``: nested dicts of arrays, layers stacked. A stored head that differs from the embedding is the
      model's, whatever ``tie_word_embeddings`` says, as in transformers.

    Raises:
      MissingFile: neither a path nor on the hub, or offline and not in the cache.
      UserError: a family, an option or a file that is not supported, named; a tensor with NaN or infinity; an adapter;
        quantised weights; a folder whose ``config.json`` names code, which is never run.

    Example::

      model, params = distill.load("path/to/folder", dtype="bfloat16", activations="bfloat16")
      logits = model.logits(params, tokens)  # [B, L, V] float32
    """
    dtype = None if dtype is None else jnp.dtype(dtype)
    quantized = dtype == jnp.int8
    try:
        opened = _opened(path_or_name, revision, activations)
        model = network(opened.config)
        held = int8(model) if quantized else model
        stored = jnp.dtype("bfloat16") if quantized else dtype
        with _placing(path_or_name, model, sharding, quantized) as place:
            shapes, (_, table, source, ignored) = shapes_of(opened.config), opened
            return held, assemble(shapes, table, source, place, dtype=stored, ignored=ignored)
    except ValueError as error:
        if str(error).startswith(str(path_or_name)):
            raise
        raise UserError(f"{path_or_name}: {error}") from error


def _opened(path_or_name: str | Path, revision: str | None, activations: Literal["float32", "bfloat16"]) -> Opened:
    """The configuration, name table and tensors of a GGUF file or a folder."""
    path = located(path_or_name)
    if path.is_file() and path.suffix == ".gguf":
        return gguf.opened(path, activations)
    folder = path if path.is_dir() else download(path_or_name, revision)
    config, name = _config_of(folder)
    family, source = FAMILIES[name], SafetensorsSource(folder)
    _refuse_more_layers(config, source)
    config, table = dataclasses.replace(config, dtype=activations), table_of(config, name)
    named = Renamed(source, name_in(family, table))
    config = _with_head(config, family, source, named)
    absent = {name_in(family, table)(tensor): array for tensor, array in family.absent(config).items()}
    return Opened(config, table_of(config, name), Completed(named, absent), left_out(family, config))


def _refuse_more_layers(config: NetworkConfig, source: SafetensorsSource) -> None:
    """Compares the layers with the tensors before anything is made for every layer."""
    if config.layers > len(source.names()):
        raise UserError(
            f"config.json: {config.layers} layers, but {source.folder} holds {len(source.names())} tensors; expected "
            "some for every layer."
        )


def _with_head(config: NetworkConfig, family: Family, source: SafetensorsSource, named: Renamed) -> NetworkConfig:
    """A tied head as the files hold it: transformers takes a stored head that differs, and one without an embedding."""
    tied = config.tied if isinstance(config, DecoderConfig) else config.mlm_head
    for copy, original in family.copies.items() if tied else ():
        if copy not in named.where:
            continue
        if original not in named.where:
            named.read_as(copy, original)
        elif not source.same(named.where[copy], named.where[original]):
            if isinstance(config, EncoderConfig):
                raise UserError(f"{copy} differs from {original}; expected the same numbers: the head is tied.")
            config = dataclasses.replace(config, tied=False)
    return config


def located(path: str | Path) -> Path:
    """The folder or file of the weights: ``path`` itself, or ``STUDENT`` of a run folder.

    Raises:
      UserError: a run folder whose student is not there yet.
    """
    path = there(Path(path))
    if (path / "checkpoints").is_dir() and not (path / STUDENT).is_dir():
        raise UserError(
            f"{path}: a run folder without {STUDENT}, which is written when its training ends; give the command that "
            "made it again. distill.fit writes none: distill.save(folder, model, params) of what it returns does."
        )
    return path / STUDENT if (path / STUDENT).is_dir() else path


@contextlib.contextmanager
def _placing(
    name: str | Path, model: Model, sharding: Callable[[Model], Any] | None, quantized: bool
) -> Iterator[Place]:
    """A ``Place`` with a progress bar on a terminal; it quantises what it has placed if asked."""
    with loading(Path(name).name, sum(map(math.prod, shapes_of(model.config).values()))) as advance:
        place = Place(None if sharding is None else sharding(model), advance)
        yield dataclasses.replace(place, finish=quantizer(model)) if quantized else place


def read_config(folder: str | Path, activations: Literal["float32", "bfloat16"] = "float32") -> NetworkConfig:
    """The network that a folder's ``config.json`` describes, without its weights.

    Raises:
      MissingFile: no ``config.json``.
      UserError: one that cannot be read, or is not supported.
    """
    return dataclasses.replace(_config_of(located(folder))[0], dtype=activations)


def _config_of(folder: Path) -> tuple[NetworkConfig, str]:
    """The network of a folder's ``config.json``, and its family."""
    check(folder)
    values = json_object(folder / "config.json")
    try:
        _refuse_code(values)
        values = text_of(values) if values.get("model_type") == "gemma3" else values
        return from_json(values, lambda: SafetensorsSource(folder).names()), values["model_type"]
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def _refuse_code(values: dict[str, Any]) -> None:
    family = FAMILIES.get(str(values.get("model_type")))
    if values.get("auto_map") and (family is None or "auto_map" not in family.harmless):
        raise UserError(
            f"config.json: auto_map names code for model_type {shown(values.get('model_type'))} that comes with "
            "the weights; it is never run (there is no trust_remote_code)."
        )


def download(name: str | Path, revision: str | None = None) -> Path:
    """The hub's folder of a model: from its cache, or downloaded; only safetensors, JSON and tokenizer files."""
    if isinstance(name, Path) or not _NAME.fullmatch(name) or name.endswith(".gguf"):
        raise MissingFile(f"{name}: no such folder or file; expected a path, or a name such as org/model.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja"]
    try:
        unwanted = ["*/*.safetensors", "*/*.json", "consolidated*"]
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
    except LocalEntryNotFoundError as error:
        raise MissingFile(
            f"{name}: no such folder, and not in the hub's cache; the hub cannot be reached, or HF_HUB_OFFLINE is set. "
            "Download it where there is a connection, or give a path."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise MissingFile(f"{name}: no such folder, and the hub does not give it ({error}).") from error
    return Path(folder)


def save(
    folder: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    *,
    family: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers opens: ``config.json``, safetensors, and the tokenizer's files.

    ``config.json`` has the older names of its keys too, for transformers 4, mlx-lm and llama.cpp's converter.
    Tensors keep their types: ``load(folder, dtype=None)`` returns the same bits. Rows of the embedding and the head
    beyond the vocabulary (``Model.with_vocabulary``) are left out: other readers would give them logits.

    Every process must call it; the first one writes. Files of an earlier save are replaced together once everything is
    written; other files stay. A save that fails or is killed leaves the folder unchanged: the new files are written to
    ``.NAME.partial`` beside it. A kill between the two renames at the end leaves the old files in ``.NAME.before``,
    where ``load(folder)`` and the next ``save`` find them.

    Args:
      folder: made if there is none.
      model: a decoder or an encoder.
      params: its parameters; factors and LoRA corrections are multiplied out.
      tokenizer: a ``TextTokenizer``, a folder whose tokenizer files are copied, a GGUF file, or an object with
        ``save_pretrained`` or ``to_str`` (of transformers, of tokenizers; the latter knows no end-of-text token and no
        chat template). None: none.
      family: the ``model_type`` to save as; None: the first that has all options of this model.
      shard_bytes: most bytes of one file.

    Raises:
      UserError: a model that is neither, one that no family can express, parameters of another one; a full disk, a
        target that cannot be written, the current folder.
    """
    config = model.config
    if isinstance(tokenizer, str | Path) and Path(tokenizer).suffix == ".gguf":
        tokenizer = gguf_tokenizer.text_tokenizer(gguf.GGUFSource(Path(tokenizer)))
    if not isinstance(config, DecoderConfig | EncoderConfig):
        raise UserError(f"save: a model with config {config!r}; expected one made by decoder(...) or encoder(...).")
    dtype = str(np.dtype(params["embedding"].dtype)) if "embedding" in params else "float32"
    params = processes.fetch(params) if processes.count() > 1 else params
    params = params if model.merge is None else model.merge(params)
    config, params = _without_padding(config, model.vocab_size, params)
    values = to_json(config, family, dtype)
    written = tensors(config, values["model_type"], params)
    stale = {"config.json"} | (set() if tokenizer is None else {*TOKENIZER_FILES, TEMPLATES})
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + 2**20

    def write_all() -> None:
        with replacing(Path(folder), size, lambda name: is_weights(name) or name in stale) as partial:
            _save_tokenizer(partial, tokenizer)
            values.update(_special_ids(partial, tokenizer))
            _save_stops(partial, values)
            write(partial, written, shard_bytes)
            (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")

    processes.from_first(write_all)


def _without_padding(config: NetworkConfig, size: int, params: Params) -> tuple[NetworkConfig, Params]:
    """The network without rows beyond its vocabulary, which no loss has seen: other readers give each a logit."""
    if size == config.vocab_size:
        return config, params
    rows = {"embedding": (slice(size),), "head": (..., slice(size)), "head_bias": (slice(size),)}
    cut = {name: params[name][own] for name, own in rows.items() if name in params}
    return dataclasses.replace(config, vocab_size=size), {**params, **cut}


def _special_ids(saved: Path, tokenizer: Any) -> dict[str, Any]:
    """Ids of special tokens, None where unknown: for a missing key transformers would take the original model's id.

    Of several stop tokens (``TextTokenizer.stop_ids``), ``eos_token_id`` is a list. ``saved`` is the folder into which
    the tokenizer was just saved.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer.special_token_ids()
    if isinstance(tokenizer, str | Path):
        given = read_json(Path(tokenizer) / "config.json")
        ids = {key: given.get(key) for key in _SPECIAL}
    else:
        ids = {key: getattr(tokenizer, key, None) for key in _SPECIAL}
    several = (ids["eos_token_id"], read_json(saved / "generation_config.json").get("eos_token_id"))
    stops = {i for some in several if some is not None for i in np.atleast_1d(some).tolist()}
    if (saved / "tokenizer.json").is_file():
        with contextlib.suppress(UserError):  # one that only transformers reads
            stops |= set(TextTokenizer.from_folder(saved).stop_ids)
    return ids | {"eos_token_id": sorted(stops) if len(stops) > 1 else next(iter(stops), None)}


def _save_stops(folder: Path, values: dict[str, Any]) -> None:
    """Writes the stop tokens where readers look for them when a model writes; other keys stay."""
    if values["eos_token_id"] is not None:
        file = folder / "generation_config.json"
        ids = {key: values[key] for key in _SPECIAL if values[key] is not None}
        file.write_text(json.dumps(read_json(file) | ids, indent=2) + "\n")


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | Path):
        files = [Path(tokenizer) / name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()]
        if not files:
            raise UserError(f"save: tokenizer={str(tokenizer)!r} holds no tokenizer file, such as tokenizer.json.")
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if (Path(tokenizer) / TEMPLATES).is_dir():
            shutil.copytree(Path(tokenizer) / TEMPLATES, folder / TEMPLATES)
    elif isinstance(tokenizer, TextTokenizer):
        tokenizer.save(folder)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer, "to_str"):
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
    else:
        raise UserError(
            f"save: tokenizer of type {type(tokenizer).__name__}; expected a folder or one that saves itself."
        )
