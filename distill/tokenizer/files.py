"""Files of a tokenizer's folder: each one that can change a token is used, known to agree, or an error that names it.

The ids are those of ``tokenizer.json`` with the tokens that other files add, as ``AutoTokenizer`` of transformers
gives them; where readers in use differ over a folder, it is refused. One difference is logged instead: for the class
LlamaTokenizer transformers 5 replaces the rules for spaces in ``tokenizer.json`` by rules of its own.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import MissingFile, UserError, shown

SPECIAL = {"eos": "eos_token", "bos": "bos_token", "pad": "pad_token", "unknown": "unk_token"}
"""Field of ``TextTokenizer`` → key of the files."""

OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
"""Files whose content ``write`` puts elsewhere: removed, so that nothing contradicts it."""

TEMPLATES = "additional_chat_templates"
"""Folder of the named chat templates."""

_NOT_KEPT = {
    *(*SPECIAL.values(), "chat_template"),  # fields of the class
    *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"),  # stand in tokenizer.json
    *("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"),  # likewise
    *("tokenizer_class", "tokenizer_file", "name_or_path", "backend", "auto_map"),  # of where it comes from
    *("is_local", "local_files_only"),
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What a folder says about its tokenizer."""

    serialized: str
    tokens: dict[str, str]
    """``eos``, ``bos``, ``pad``, ``unknown``, as far as they are named."""
    templates: dict[str, str]
    """Name → chat template."""
    stops: tuple[str, ...]
    """Tokens that ``generation_config.json`` and ``config.json`` stop at."""
    options: dict[str, Any]
    """Further keys of ``tokenizer_config.json``."""


class _Added(NamedTuple):
    """A token that a file beside ``tokenizer.json`` names."""

    content: str
    file: Path
    id: int | None = None
    """None: any."""
    flags: dict[str, bool] | None = None
    """None: any; a token that is added gets the usual ones."""
    may_be_new: bool = True
    """Whether the vocabulary may lack it: False for the end-of-text token and its like, which need a row."""


def read(folder: Path, file: Path, *, given: Iterable[str] = ()) -> Found:
    """Reads a folder.

    Args:
      folder: the folder.
      file: its ``tokenizer.json``.
      given: fields of ``SPECIAL`` that the caller names, so that the files need not agree on them.

    Raises:
      MissingFile: no ``tokenizer.json``.
      UserError: a file that cannot be read, or two that disagree.
    """
    if not file.is_file():
        raise MissingFile(
            f"{file}: missing; expected a folder with a tokenizer.json. Of a folder with tokenizer.model or "
            "vocab.json alone, transformers makes one: AutoTokenizer.from_pretrained(A).save_pretrained(B)."
        )
    config = read_json(folder / "tokenizer_config.json")
    special = read_json(folder / "special_tokens_map.json")
    text = _text_of(file)
    tokens = _tokens(folder, config, special, set(given))
    parsed = _parsed(file, text)
    added = [*_declared(folder, config), *_specials(folder, config, special, tokens)]
    text = _with_added(file, text, parsed, added)
    _check_vocabulary(folder, parsed)
    _check_prefix(folder, config, parsed)
    _log_other_spaces(folder, config, parsed)
    kept = {key: value for key, value in config.items() if key not in _NOT_KEPT}
    return Found(text, tokens, _templates(folder, config), _stops(folder, text), kept)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file.

    Raises:
      UserError: something else.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON {type(value).__name__}; expected an object.")
    return value


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}); convert it.") from error


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from error
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{file}: no tokenizer that the library tokenizers reads; expected an object with 'model'.")
    added = value.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(one, dict) and {"id", "content"} <= one.keys() for one in added
    ):
        raise UserError(f"{file}: added_tokens is {shown(added)}; expected a list of objects with 'id' and 'content'.")
    return value


# ---- special and added tokens


def _content(file: Path, key: str, token: Any) -> str | None:
    """A token's text; files have it as text or as an object with properties."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is None and token is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{file}: {key} is {shown(token)}; expected a token's text, or an object with 'content'.")
    return text


def _tokens(folder: Path, config: dict, special: dict, given: set[str]) -> dict[str, str]:
    """The special tokens, which both files name alike."""
    found = {}
    for name, key in SPECIAL.items():
        one = _content(folder / "tokenizer_config.json", key, config.get(key))
        other = _content(folder / "special_tokens_map.json", key, special.get(key))
        if name not in given and None not in (one, other) and one != other:
            raise UserError(
                f"{folder}: {key} is {shown(one)} in tokenizer_config.json and {shown(other)} in "
                f"special_tokens_map.json; readers take one or the other. Remove the wrong one."
            )
        if (token := one if one is not None else other) is not None:
            found[name] = token
    return found


def _declared(folder: Path, config: dict) -> Iterator[_Added]:
    """Tokens with ids: ``added_tokens_decoder`` of the configuration, ``added_tokens.json``."""
    file, decoder = folder / "tokenizer_config.json", config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{file}: added_tokens_decoder is {shown(decoder)}; expected an object, id → token.")
    for key, token in decoder.items():
        if not key.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise UserError(
                f"{file}: added_tokens_decoder has {shown(key)}: {shown(token)}; expected an id and an object with "
                "'content'."
            )
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False} | token
        flags.setdefault("normalized", not flags["special"])
        yield _Added(token["content"], file, int(key), {name: flags[name] is True for name in _FLAGS})
    file = folder / "added_tokens.json"
    for token, i in read_json(file).items():
        if not isinstance(i, int) or isinstance(i, bool):
            raise UserError(f"{file}: token {shown(token)} has the id {shown(i)}; expected a number.")
        yield _Added(token, file, i)


def _specials(folder: Path, config: dict, special: dict, tokens: Mapping[str, str]) -> Iterator[_Added]:
    """Tokens that are special because a key names them, in the order in which transformers gives them new ids."""
    yield from (_Added(token, folder / "tokenizer_config.json", may_be_new=False) for token in tokens.values())
    named: dict[str, _Added] = {}
    further: list[_Added] = []
    for file, values in ((folder / "tokenizer_config.json", config), (folder / "special_tokens_map.json", special)):
        for key, value in values.items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                several = list(value.values()) if isinstance(value, dict) else value or []
                if not isinstance(several, list):
                    raise UserError(f"{file}: {key} is {shown(value)}; expected a list of tokens.")
                further += [_Added(_content(file, key, token) or "", file) for token in several]
            elif key.endswith("_token") and key not in SPECIAL.values() and isinstance(value, str | dict):
                named[key] = _Added(_content(file, key, value) or "", file)
    yield from (named.pop(key) for key in ("sep_token", "cls_token", "mask_token") if key in named)
    yield from (*named.values(), *further)


def _with_added(file: Path, text: str, parsed: dict, wanted: list[_Added]) -> str:
    """``tokenizer.json`` with the tokens that the other files add; unchanged if it has them all.

    Raises:
      UserError: two files give a token different ids, or it gets another one than its file says.
    """
    there = {token["content"]: token for token in parsed.get("added_tokens") or []}
    ids = _vocabulary(parsed) | {content: token["id"] for content, token in there.items()}
    for token, i in ids.items():
        if not isinstance(i, int) or not 0 <= i < 2**31:
            raise UserError(f"{file}: token {shown(token)} has the id {shown(i)}; expected a number below 2³¹.")
    names = {i: token for token, i in ids.items()}
    special = {token.content for token in wanted if token.id is None}
    new: dict[str, _Added] = {}
    for token in filter(lambda token: token.content, wanted):
        known = ids.get(token.content)
        if token.id is not None and (known if known is not None else token.id) != token.id:
            raise UserError(
                f"{token.file}: token {shown(token.content)} has the id {token.id}, in {file.name} {known}."
            )
        if token.id is not None and names.get(token.id, token.content) != token.content:
            raise UserError(
                f"{token.file}: id {token.id} is token {shown(token.content)}, in {file.name} {shown(names[token.id])}."
            )
        old = there.get(token.content)
        usual = {name: False for name in _FLAGS} | {"special": token.content in special}
        usual["normalized"] = not usual["special"]
        flags = token.flags or old or usual
        same = old is not None and all(bool(old.get(name)) == bool(flags.get(name)) for name in _FLAGS)
        if not same and (known is not None or token.may_be_new) and token.content not in new:
            new[token.content] = token._replace(flags=flags)
    return _add(file, text, parsed, list(new.values())) if new else text


def _add(file: Path, text: str, parsed: dict, new: list[_Added]) -> str:
    """``tokenizer.json`` with further added tokens, of which the library ``tokenizers`` gives the ids."""
    from tokenizers import AddedToken, Tokenizer

    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: no tokenizer that the library tokenizers reads ({error}).") from error
    entries = {token["content"]: token for token in parsed.get("added_tokens") or []}
    last = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    for token in sorted(new, key=lambda token: last + 1 if token.id is None else token.id):
        flags = token.flags or {}
        backend.add_tokens([AddedToken(token.content, **{name: bool(flags.get(name)) for name in _FLAGS})])
        got = backend.token_to_id(token.content)
        if token.id is not None and got != token.id:
            raise UserError(
                f"{token.file}: token {shown(token.content)} has the id {token.id}; {file.name} does not hold it, and "
                f"the next free id is {got}. Save the tokenizer again where it was made."
            )
        entries[token.content] = {"id": got, "content": token.content} | {k: bool(flags.get(k)) for k in _FLAGS}
    # Written here and not by the library, which loses the vocabulary of a WordLevel model whose ids have holes.
    parsed = parsed | {"added_tokens": sorted(entries.values(), key=lambda entry: entry["id"])}
    return json.dumps(parsed, ensure_ascii=False)


def _vocabulary(parsed: dict) -> dict[str, int]:
    """Token → id of the model inside ``tokenizer.json``, added tokens aside."""
    vocabulary = parsed["model"].get("vocab")
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        pairs = (one for one in enumerate(vocabulary) if isinstance(one[1], list) and one[1])
        return {str(one[0]): i for i, one in pairs}
    return dict(vocabulary) if isinstance(vocabulary, dict) else {}


# ---- what must agree


def _check_vocabulary(folder: Path, parsed: dict) -> None:
    """``vocab.json`` and ``merges.txt``, which readers without ``tokenizer.json`` take."""
    known = _vocabulary(parsed) | {token["content"]: token["id"] for token in parsed.get("added_tokens") or []}
    for token, i in read_json(folder / "vocab.json").items():
        if known.get(token) != i:
            raise UserError(
                f"{folder / 'vocab.json'}: token {shown(token)} has the id {i}, in tokenizer.json "
                f"{known.get(token, 'none')}; they belong to two tokenizers. Remove the wrong file."
            )
    file, merges = folder / "merges.txt", parsed["model"].get("merges")
    if not file.is_file() or not merges:
        return
    lines = _text_of(file).split("\n")
    own = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    theirs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if own != theirs:
        at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
        raise UserError(
            f"{file}: {len(own)} merges, in tokenizer.json {len(theirs)}; the first that differs is number {at + 1}. "
            "They belong to two tokenizers. Remove the wrong file."
        )


def _check_prefix(folder: Path, config: dict, parsed: dict) -> None:
    """``add_prefix_space`` as ``tokenizer.json`` has it; special tokens are found in a text."""
    file = folder / "tokenizer_config.json"
    if config.get("split_special_tokens"):
        raise UserError(f"{file}: split_special_tokens is true; expected special tokens that are found in a text.")
    wanted, actual = config.get("add_prefix_space"), list(_prefixes(parsed))
    if isinstance(wanted, bool) and actual and any(actual) != wanted:
        raise UserError(
            f"{file}: add_prefix_space is {str(wanted).lower()}, tokenizer.json "
            f"{'puts a space' if any(actual) else 'puts no space'} before a text; readers take one or the other. "
            "Make them agree."
        )


def _prefixes(parsed: dict) -> Iterator[bool]:
    """For each part of ``tokenizer.json`` that could put a space before a text: whether it does."""
    waiting = [parsed.get("normalizer"), parsed.get("pre_tokenizer")]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        waiting += [*(part.get("normalizers") or []), *(part.get("pretokenizers") or [])]
        if part.get("type") == "ByteLevel":
            yield bool(part.get("add_prefix_space"))
        if part.get("type") == "Metaspace":
            yield part.get("prepend_scheme", "always") != "never"
        if part.get("type") == "Prepend":
            yield True


def _log_other_spaces(folder: Path, config: dict, parsed: dict) -> None:
    """Logs where transformers 5 gives other ids: it builds a LlamaTokenizer without the normalizer of the file."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name == "LlamaTokenizer" and '"Prepend"' in json.dumps(parsed.get("normalizer")):
        log.warning(
            "%s: spaces before a text and after a special token are those of tokenizer.json; transformers 5 builds %s "
            "by rules of its own, whose ids can differ there",
            folder,
            name,
        )


def check_ends(folder: Path, start: Mapping[str, bool]) -> None:
    """``add_bos_token`` and ``add_eos_token`` as the post-processor of ``tokenizer.json`` has it.

    Args:
      folder: of the files.
      start: key → whether the tokenizer puts that token around a text.

    Raises:
      UserError: ``tokenizer_config.json`` says something else.
    """
    config = read_json(folder / "tokenizer_config.json")
    for key, actual in start.items():
        wanted = config.get(key)
        if isinstance(wanted, bool) and wanted != actual:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: {key} is {str(wanted).lower()}, but the post-processor of "
                f"tokenizer.json {'adds that token' if actual else 'adds no such token'}; readers take one or the "
                f"other. Set {key} to {str(actual).lower()}, or make the file again: "
                f"AutoTokenizer.from_pretrained(A, {key}={wanted}).save_pretrained(B)."
            )


# ---- chat templates and stop tokens


def _templates(folder: Path, config: dict) -> dict[str, str]:
    """Name → chat template, from all four places it can stand in."""
    places: list[tuple[Path, str, Any]] = []
    file = folder / "chat_template.jinja"
    if file.is_file():
        places.append((file, "default", _text_of(file)))
    places += [(one, one.stem, _text_of(one)) for one in sorted((folder / TEMPLATES).glob("*.jinja"))]
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = (config if file.name == "tokenizer_config.json" else read_json(file)).get("chat_template")
        places += [(file, name, template) for name, template in _named(file, value)]
    found: dict[str, tuple[Path, str]] = {}
    for file, name, template in places:
        other, known = found.setdefault(name, (file, template))
        if known.removesuffix("\n") != template.removesuffix("\n"):
            raise UserError(
                f"{folder}: the chat template in {file.name} differs from the one in {other.name}; readers take one or "
                "the other. Remove the wrong one."
            )
    return {name: template for name, (_, template) in found.items()}


def _named(file: Path, value: Any) -> list[tuple[str, str]]:
    """Names and templates of a value ``chat_template``: a text, an object, or a list of objects."""
    if isinstance(value, str):
        return [("default", value)]
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        pairs = [(one.get("name"), one.get("template")) for one in value]
    else:
        pairs = [] if value is None else [(None, None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UserError(
            f"{file}: chat_template is {shown(value)}; expected a text, an object of name → text, or a list of "
            "{'name': …, 'template': …}."
        )
    return pairs


def choose(folder: Path, templates: Mapping[str, str], name: str | None) -> str | None:
    """The template for conversations: the one asked for, ``default``, or the only one.

    Raises:
      UserError: no such name, or several of which none is called ``default``.
    """
    if name is not None and name not in templates:
        raise UserError(f"{folder}: no chat template {name!r}; there are: {', '.join(sorted(templates)) or 'none'}.")
    if name is not None or "default" in templates:
        return templates["default" if name is None else name]
    if len(templates) > 1:
        raise UserError(
            f"{folder}: chat templates {', '.join(sorted(templates))}, none called default; choose one: "
            "from_folder(..., template=NAME), or copy it into a file chat_template.jinja of the folder."
        )
    return next(iter(templates.values()), None)


def _stops(folder: Path, text: str) -> tuple[str, ...]:
    """Tokens of ``eos_token_id`` in ``generation_config.json`` and ``config.json``."""
    names: dict[int, str] = {}
    found: dict[str, None] = {}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        values = read_json(file)
        inner = values.get("text_config")
        for holder in (values, inner if isinstance(inner, dict) else {}):
            for i in _ids_of(file, holder.get("eos_token_id")):
                names = names or _names(text)
                if i not in names:
                    raise UserError(f"{file}: eos_token_id {i} is no token of tokenizer.json; remove it there.")
                found[names[i]] = None
    return tuple(sorted(found))


def _names(text: str) -> dict[int, str]:
    parsed = json.loads(text)
    names = {i: token for token, i in _vocabulary(parsed).items()}
    return names | {token["id"]: token["content"] for token in parsed.get("added_tokens") or []}


def _ids_of(file: Path, value: Any) -> list[int]:
    several = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in several):
        raise UserError(f"{file}: eos_token_id is {shown(value)}; expected an id or a list of ids.")
    return several


# ---- writing


def write(
    folder: Path,
    serialized: str,
    config: dict[str, Any],
    templates: Mapping[str, str],
    special_ids: Mapping[str, Any],
) -> None:
    """Writes the files of a tokenizer, each fact in every spelling that readers in use know.

    Args:
      folder: made if there is none.
      serialized: ``tokenizer.json``.
      config: ``tokenizer_config.json``; the chat template is put into it.
      templates: name → chat template; ``default`` goes into ``chat_template.jinja``.
      special_ids: keys of ``generation_config.json``; its other keys stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if templates:
        several = [{"name": name, "template": template} for name, template in templates.items()]
        config = config | {"chat_template": several if len(several) > 1 else several[0]["template"]}
    (folder / "tokenizer.json").write_text(serialized, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", read_json(folder / "generation_config.json") | dict(special_ids))
    for old in (folder / TEMPLATES).glob("*.jinja"):
        old.unlink()
    for name in ("chat_template.jinja", *OTHER_FILES):
        (folder / name).unlink(missing_ok=True)
    for name, template in templates.items():
        file = folder / "chat_template.jinja" if name == "default" else folder / TEMPLATES / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
