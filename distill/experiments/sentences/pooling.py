"""How a folder of sentence-transformers makes one vector of a sentence: its modules.json and what that names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from distill.errors import MissingFile, UserError
from distill.models.encoder import Kind

_KINDS: dict[str, Kind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_OTHERS = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
_NAMES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
"""Value of ``pooling_mode``, by which newer files name one."""
_SIZES = ("word_embedding_dimension", "embedding_dimension", "include_prompt")
_CONFIGS = ("sentence_bert_config.json", "config_sentence_transformers.json")


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a teacher's tokens become one vector; its student does the same.

    Example:
      >>> Pooling().kind
      'mean'
    """

    kind: Kind = "mean"
    """As for ``models.encoder.pool``."""
    longest: int | None = None
    """Tokens at which sentence-transformers cuts a sentence; None: not known."""
    files: tuple[tuple[str, str], ...] = ()
    """Name and content of the files that say so, written beside a saved student."""


def read_pooling(folder: Path, width: int) -> Pooling:
    """The pooling of a folder; the mean over tokens without modules.json, as sentence-transformers has it.

    A final ``Normalize`` changes no cosine, and embeddings have norm 1 here in any case.

    Args:
      folder: with config.json, and modules.json if it is one of sentence-transformers.
      width: of the encoder, D.

    Raises:
      MissingFile: modules.json names a pooling without config.json.
      UserError: a file that cannot be read, a module or a pooling that is not supported, or a prompt or lower case
        that sentence-transformers would apply to every text.
    """
    modules = _read(folder / "modules.json")
    if modules is None:
        return Pooling("mean", _longest(folder), _plain_files(width))
    place = _place_of_pooling(folder, modules)
    name = f"{place}/config.json"
    if not (folder / name).is_file():
        raise MissingFile(f"{folder / name}: missing; modules.json of this folder names it.")
    kind = _kind(folder / name, _object(folder / name))
    _refuse_texts_that_change(folder)
    kept = {"modules.json": modules, name: _object(folder / name)}
    kept |= {file: _object(folder / file) for file in _CONFIGS if (folder / file).is_file()}
    return Pooling(kind, _longest(folder), tuple((file, _text(values)) for file, values in kept.items()))


def _place_of_pooling(folder: Path, modules: Any) -> str:
    """The folder of the pooling among modules that are all supported and in order."""
    if not (isinstance(modules, list) and all(isinstance(module, dict) for module in modules)):
        raise UserError(f"{folder}/modules.json: expected a list of modules.")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder}/modules.json: {', '.join(kinds)[:200] or 'no modules'}; expected Transformer, Pooling and "
            "perhaps Normalize: others, such as Dense, have weights or rules that are not supported."
        )
    own, pooling = (str(module.get("path") or "") for module in modules[:2])
    if own or not pooling or Path(pooling).name != pooling:
        raise UserError(
            f"{folder}/modules.json: the Transformer is in {own[:100]!r}, the Pooling in {pooling[:100]!r}; expected "
            "the folder itself, and a folder in it such as 1_Pooling."
        )
    return pooling


def _kind(file: Path, values: dict[str, Any]) -> Kind:
    named = values.get("pooling_mode")
    known = {*_KINDS, *_OTHERS, *_SIZES, "pooling_mode"}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{file}: unknown keys {', '.join(unknown)[:200]}; expected {', '.join(sorted(known))}.")
    if named is not None:
        chosen = [named]
        kinds = [_NAMES[name] for name in chosen if isinstance(name, str) and name in _NAMES]
    else:
        defaults = {"pooling_mode_mean_tokens": True}
        chosen = [name for name in (*_KINDS, *_OTHERS) if values.get(name, defaults.get(name, False))]
        kinds = [_KINDS[name] for name in chosen if name in _KINDS]
    if len(chosen) != 1 or not kinds:
        raise UserError(
            f"{file}: the pooling is {', '.join(map(str, chosen))[:200] or 'none'}; expected one of "
            f"{', '.join(_NAMES)}, and no other beside it."
        )
    return kinds[0]


def _refuse_texts_that_change(folder: Path) -> None:
    for file, name in zip(_CONFIGS, ("do_lower_case", "default_prompt_name"), strict=True):
        if value := _object(folder / file).get(name):
            raise UserError(
                f"{folder}: {name}={str(value)[:100]!r} changes every text before it is tokenized, which is not "
                "supported; expected false or null."
            )


def _longest(folder: Path) -> int | None:
    length = _object(folder / "sentence_bert_config.json").get("max_seq_length")
    return length if isinstance(length, int) else None


def _object(file: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    values = _read(file)
    if not isinstance(values, dict | None):
        raise UserError(f"{file}: expected an object.")
    return values or {}


def _read(file: Path) -> Any:
    """The content of a JSON file; None where there is none."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({error}); expected JSON.") from error


def _plain_files(width: int) -> tuple[tuple[str, str], ...]:
    """Names and contents of the files with which sentence-transformers takes the mean over tokens."""
    where = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(where)
    ]
    pooling = {"word_embedding_dimension": width} | {key: kind == "mean" for key, kind in _KINDS.items()}
    return ("modules.json", _text(modules)), ("1_Pooling/config.json", _text(pooling | dict.fromkeys(_OTHERS, False)))


def _text(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
