"""The tokenizer of a GGUF file, a byte-level BPE, rebuilt with ``tokenizers`` alone.

A file names how text is cut before merges are applied (``tokenizer.ggml.pre``) and does not say what that means; the
table here holds those that are known.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.errors import UserError
from distill.tokenizer import TextTokenizer
from distill.weights.gguf import GGUFSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """Pre-tokenizer: how a text is cut into pieces before merging."""

    regex: str | None = None
    """Regular expression of a piece; None: GPT-2's."""
    digits: bool = False
    """Cuts off every digit as a piece before the regular expression is applied."""
    nfc: bool = False
    """Normalises text to Unicode's composed form (NFC) first."""
    whole_words: bool = False
    """A piece that is in the vocabulary is one token, without merging."""
    starts: bool = False
    """Texts start with the beginning-of-text token by default."""


CUTS: Mapping[str, Cut] = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "qwen2": Cut(rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}|{_MARKS_AND_SPACES}", nfc=True),
    "llama-bpe": Cut(rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}{{1,3}}|{_MARKS_AND_SPACES}", whole_words=True, starts=True),
}
"""Value of ``tokenizer.ggml.pre`` → pre-tokenizer."""


def tokenizer_of(source: GGUFSource) -> "Tokenizer":
    """The tokenizer of a file: the same ids as the one the file was made with.

    Control tokens written in a text are found and are special (``decode`` leaves them out unless asked); unused rows
    of the vocabulary are no tokens. Texts start with the beginning-of-text token, or end with the end-of-text token,
    if the file says so. The end-of-text token and the chat template have no place in an object of ``tokenizers``:
    to save or to converse, take ``text_tokenizer``.

    Raises:
      UserError: no byte-level BPE, or a pre-tokenizer that is not in ``CUTS``.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = _cut(source)
    tokens = source.value("tokenizer.ggml.tokens", [])
    kinds = source.value("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    if len(ids) != sum(kind != _UNUSED for kind in kinds):
        raise UserError(f"{source.path}: the vocabulary holds a token twice.")
    merges = [tuple(merge.split(" ")) for merge in source.value("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=cut.whole_words))
    tokenizer.normalizer = normalizers.NFC() if cut.nfc else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.regex is None)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    steps += [pre_tokenizers.Split(Regex(cut.regex), behavior="isolated")] if cut.regex is not None else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            added = AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    _add_ends(source, tokenizer, tokens, cut)
    return tokenizer


def special_ids(source: GGUFSource) -> dict[str, int]:
    """Ids of ``bos``, ``eos``, ``pad`` and ``unknown``, as far as the file names them."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unknown": "unknown"}
    found = {name: source.value(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def stop_ids(source: GGUFSource) -> dict[str, int]:
    """Ids of the tokens that end a turn (``eot``) or a message (``eom``), as far as the file names them."""
    found = {name: source.value(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")}
    return {name: value for name, value in found.items() if value is not None}


def chat_template(source: GGUFSource) -> str | None:
    """The file's Jinja template of a conversation."""
    return source.value("tokenizer.chat_template")


def named_templates(source: GGUFSource) -> dict[str, str]:
    """The file's further chat templates by name, such as ``tool_use``."""
    names = source.value("tokenizer.chat_templates", [])
    found = {name: source.value(f"tokenizer.chat_template.{name}") for name in names}
    return {name: template for name, template in found.items() if template is not None}


def _cut(source: GGUFSource) -> Cut:
    kind, name = source.value("tokenizer.ggml.model"), source.value("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(f"{source.path}: a tokenizer of kind {kind!r}; supported: 'gpt2', byte-level BPE.")
    if name not in CUTS:
        raise UserError(f"{source.path}: pre-tokenizer {name!r}; supported: {', '.join(sorted(CUTS))}.")
    return CUTS[name]


def _add_ends(source: GGUFSource, tokenizer: "Tokenizer", tokens: list[str], cut: Cut) -> None:
    """The beginning- and end-of-text tokens that the file puts around a text."""
    from tokenizers import processors

    ids, ends = special_ids(source), {}
    for name, default in (("bos", cut.starts), ("eos", False)):
        if not source.value(f"tokenizer.ggml.add_{name}_token", default):
            continue
        if name not in ids:
            raise UserError(f"{source.path}: texts get a token {name}, and the file does not say which.")
        ends[name] = ids[name]
    if ends:
        start, end = ([tokens[ends[name]]] if name in ends else [] for name in ("bos", "eos"))
        special: list[Any] = [(tokens[i], i) for i in ends.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*start, "$A", *end], special_tokens=special)


def text_tokenizer(source: GGUFSource, *, eos: str | None = None) -> TextTokenizer:
    """``tokenizer_of`` a file with its special tokens, stop tokens and chat templates.

    Args:
      source: the file.
      eos: the end-of-text token, in place of the file's.

    Raises:
      UserError: as ``tokenizer_of``, the file names no end-of-text token, or a special token that is not there.
    """
    tokens, stops = source.value("tokenizer.ggml.tokens", []), stop_ids(source)
    named = {name: _token(source, tokens, name, i) for name, i in (special_ids(source) | stops).items()}
    ends = tuple(sorted({named.pop(name) for name in stops}))
    if (eos := eos or named.pop("eos", None)) is None:
        raise UserError(f"{source.path}: the file names no end-of-text token; give one: eos='</s>'.")
    named.pop("eos", None)
    template, more = chat_template(source), named_templates(source)
    made = tokenizer_of(source).to_str()
    return TextTokenizer(made, eos, **named, chat_template=template, templates=more, stops=ends)


def _token(source: GGUFSource, tokens: list[str], name: str, i: int) -> str:
    if not 0 <= i < len(tokens):
        raise UserError(f"{source.path}: the token {name} has the id {i}; expected one of the {len(tokens)} tokens.")
    return tokens[i]
