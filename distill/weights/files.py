"""The files of a model folder: each that can change the model is read, known to agree, or an error that names it.

Files of tokenizers are ``TextTokenizer``'s. A file that is not in a list here changes no logit.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import MissingFile, UserError, shown, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
MODULES = "modules.json"

AGREE: Mapping[str, str] = {
    r"consolidated.*\.safetensors": "the same model under the names of its makers",
    r"model\.[\w-]+\.safetensors": "the same model in another precision, which transformers reads if asked by name",
    r".*\.(bin|pt|pth|ckpt|pkl|h5|msgpack|ot|onnx|gguf|mlmodel|tflite|npz)": "the same model in another format",
}
"""Pattern of names → why they are not read beside ``model.safetensors`` or its index."""

_UNPICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

_QUANTIZED = "the weights are quantised; expected floats of 16 bits or more: take the release that is not quantised"
_ADAPTER = (
    "an adapter beside a model, which transformers would add to it; expected one model: merge it (peft: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)), or move its files elsewhere"
)
REFUSED: Mapping[str, str] = {
    r"adapter_(config\.json|model.*)": _ADAPTER,
    r"(quantize|quant|hf_quant)_config\.json": _QUANTIZED,
}
"""Pattern of names → what they would do."""

UNDERSTOOD = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that ``models.encoder.embed`` has: the encoder, the pooling, the norm of 1."""


def check(folder: Path) -> None:
    """Refuses a folder with a file that changes the model and is not read.

    Raises:
      MissingFile: no ``config.json``.
      UserError: an adapter, alone or beside a model; quantised weights; several models; a module of
        sentence-transformers that is not known.
    """
    names = _names(folder)
    if ADAPTER in names and "config.json" not in names:
        raise UserError(_alone(folder))
    for name in names:
        for pattern, why in REFUSED.items():
            if re.fullmatch(pattern, name):
                raise UserError(f"{folder}: {name}: {why}.")
    if MODULES in names:
        _check_modules(folder / MODULES)
    file = folder / "config.json"
    if not file.is_file():
        alone = [name for name in names if name.endswith(".gguf")]
        advice = f"give the path of {alone[0]} for that file" if alone else "expected a Hugging Face folder"
        raise MissingFile(f"{file}: missing; {advice}.")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error}); expected a folder that can be read.") from error


def _alone(folder: Path) -> str:
    values = json_object(folder / ADAPTER)
    kind, base = shown(values.get("peft_type")), shown(values.get("base_model_name_or_path"))
    return (
        f"{folder}: an adapter (peft_type {kind}) of {base}, no model; expected one: merge it into its base (peft: "
        "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)) and give that folder."
    )


def _check_modules(file: Path) -> None:
    modules = _parsed(file)
    kinds = [entry.get("type") for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else [None]
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind.split(".")[-1] not in UNDERSTOOD]
    if unknown:
        raise UserError(
            f"{file}: module {some(map(shown, unknown))}; expected {', '.join(UNDERSTOOD)}: a module that computes "
            "more from the encoder's states is not read."
        )


def only_file(folder: Path) -> str:
    """The one file of weights of a folder without an index.

    Raises:
      UserError: several models, or none that is read.
    """
    names = _names(folder)
    stored = [name for name in names if name.endswith(".safetensors")]
    mine = [name for name in stored if not _agrees(name)] or stored
    if SINGLE in mine:
        _refuse_others(folder, {SINGLE}, mine)
        return SINGLE
    if len(mine) == 1:
        return mine[0]
    if mine:
        raise UserError(f"{folder}: {some(mine)} without {INDEX}; expected one file, or an index.")
    if pickled := [name for name in names if Path(name).suffix in _UNPICKLED]:
        raise UserError(
            f"{folder}: only {some(pickled, 3)}, which can run code when opened and is not read; "
            "expected safetensors: convert it, or take another revision."
        )
    alone = [name for name in names if name.endswith(".gguf")]
    raise UserError(f"{folder}: no safetensors file{f'; to read {alone[0]}, give its path' if alone else ''}.")


def _agrees(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in AGREE)


def _refuse_others(folder: Path, read: set[str], there: list[str]) -> None:
    if others := [name for name in there if name not in read]:
        raise UserError(f"{folder}: {some(others)} beside {some(sorted(read))}; expected one model: move the others.")


def check_beside_index(folder: Path, named: set[str]) -> None:
    """Refuses safetensors that the index does not name: readers differ in which of the two they take."""
    there = [name for name in _names(folder) if name.endswith(".safetensors") and not _agrees(name)]
    _refuse_others(folder, named, there)


def json_object(path: Path, most: int = 2**28) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
      path: of the file.
      most: bytes; a larger file is not opened.

    Raises:
      MissingFile: no such file, or no regular one.
      UserError: no JSON in UTF-8, too deep, too large, or no object.
    """
    values = _parsed(path, most)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object; got {shown(values)}.")
    return values


def _parsed(path: Path, most: int = 2**28) -> Any:
    try:
        if not path.is_file():
            raise MissingFile(f"{path}: missing, or no regular file.")
        if path.stat().st_size > most:
            raise UserError(f"{path}: {path.stat().st_size} bytes; expected at most {most}.")
        return json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON in UTF-8 ({shown(str(error))}).") from error
