"""Decoders in GGUF files, the format of llama.cpp: configuration, name table and tensors, dequantised when read.

``gguf_tokenizer.py`` builds the tokenizer of such a file.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.errors import UserError
from distill.models.config import DecoderConfig, RopeScaling
from distill.models.rope import slowed
from distill.weights.gguf_header import check_header
from distill.weights.safetensors import refuse_nonfinite
from distill.weights.table import Opened, Row, Shape, Table, Transform, flat, linear

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Supported values of ``general.architecture``."""

_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
}
_IRRELEVANT = {"vocab_size"}
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the factor by which each pair of a head turns more slowly."""
_WHOLE = {
    "block_count": 2**16,
    "context_length": 2**40,
    "embedding_length": 2**24,
    "feed_forward_length": 2**24,
    "attention.head_count": 2**16,
    "attention.head_count_kv": 2**16,
    "attention.key_length": 2**16,
    "attention.value_length": 2**16,
    "rope.dimension_count": 2**16,
    "rope.scaling.original_context_length": 2**40,
}
"""Keys whose values are whole numbers from 1 on → most."""
_POSITIVE = {"attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.attn_factor"}
_HARMLESS: Mapping[str, Sequence[Any]] = {
    "rope.scaling.finetuned": (False, True),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys of a header and the values at which they change nothing."""


class GGUFSource:
    """A GGUF file: its header, and its tensors as float32, one at a time.

    Args:
      path: the file; only its header is read.

    Raises:
      UserError: no GGUF file, a broken one, one of several parts, or the package ``gguf`` is missing.
    """

    def __init__(self, path: str | Path):
        try:
            import gguf
        except ImportError as error:
            raise UserError("reading GGUF files needs a package: pip install 'distill[gguf]'.") from error
        self.path = Path(path)
        check_header(self.path)
        try:
            reader = gguf.GGUFReader(self.path)
        except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise UserError(f"{path}: not readable as GGUF: damaged or too new ({error}).") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if (parts := self.value("split.count", 1)) > 1:
            raise UserError(f"{path}: one of {parts} parts of a model; join them (gguf-split --merge) first.")

    def header(self, prefix: str) -> dict[str, Any]:
        """Values of the header whose keys have this prefix, by key without the prefix."""
        return {key.removeprefix(prefix): self.value(key) for key in self._fields if key.startswith(prefix)}

    def value(self, key: str, default: Any = None) -> Any:
        """Value of a key of the header: a number, text, bool, or a list of them."""
        return self._fields[key].contents() if key in self._fields else default

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._tensors)

    def shape(self, name: str) -> Shape:
        """A tensor's shape, outermost axis first, as ``get`` returns it."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def get(self, name: str) -> np.ndarray:
        """One tensor, dequantised now, float32.

        Raises:
          UserError: a quantisation that cannot be undone; NaN or infinity.
        """
        from gguf import quants

        tensor = self._tensors[name]
        mapped = tensor.data  # only for its type and shape: pages of the map would stay in memory
        data = np.fromfile(self.path, mapped.dtype, mapped.size, offset=int(tensor.data_offset)).reshape(mapped.shape)
        try:
            array = quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            known = ", ".join(["F32", "F16", *sorted(kind.name for kind in quants._type_traits)])
            raise UserError(
                f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which cannot be dequantised; "
                f"supported: {known}."
            ) from error
        array = np.asarray(array, np.float32).reshape(self.shape(name))
        refuse_nonfinite(array, self.path, name)
        return array


def architecture_of(source: GGUFSource) -> str:
    """One of ``ARCHITECTURES``.

    Raises:
      UserError: another one.
    """
    name = source.value("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{source.path}: architecture {name!r}; supported: {', '.join(ARCHITECTURES)}.")
    return name


def config_of(source: GGUFSource, dtype: Literal["float32", "bfloat16"] = "float32") -> DecoderConfig:
    """The decoder that a file's header and the names of its tensors describe.

    Args:
      source: the file.
      dtype: of the activations.

    Raises:
      UserError: an architecture or a key of the header that the decoder has no counterpart of, a missing key.
    """
    prefix = f"{architecture_of(source)}."
    header = source.header(prefix)
    for key, value in header.items():
        if key not in _READ | _IRRELEVANT and value not in _HARMLESS.get(key, ()):
            raise UserError(f"{source.path}: the header has {prefix}{key} = {value!r}, which the decoder lacks.")
        if isinstance(value, list) and key in _READ:
            raise UserError(f"{source.path}: {prefix}{key} differs between layers; the decoder's layers are alike.")
        _check_value(source, prefix + key, key, value)
    names = source.names()
    if prefix == "llama." and "blk.0.attn_q_norm.weight" in names:
        raise UserError(f"{source.path}: architecture llama with norms of queries; the order in them is not known.")

    def number(key: str) -> Any:
        if key not in header:
            raise UserError(f"{source.path}: the header lacks {prefix}{key}.")
        return header[key]

    heads, width = number("attention.head_count"), number("embedding_length")
    layers = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    if number("block_count") != layers:
        raise UserError(
            f"{source.path}: {prefix}block_count = {header['block_count']}; it has tensors of {layers} layers."
        )
    if width % heads and "attention.key_length" not in header:
        raise UserError(f"{source.path}: {prefix}embedding_length = {width} is no multiple of {heads} heads.")
    key_size = header.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.get(key, key_size) != key_size:
            raise UserError(f"{source.path}: {prefix}{key} = {header[key]}, a key has {key_size}; expected the same.")
    if "token_embd.weight" not in names:
        raise UserError(f"{source.path}: the file has no tensor token_embd.weight.")
    theta = _short(header.get("rope.freq_base", 10_000.0))
    return DecoderConfig(
        vocab_size=source.shape("token_embd.weight")[0],
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=header.get("attention.head_count_kv", heads),
        head_dim=None if key_size * heads == width else key_size,
        feed_forward=number("feed_forward_length"),
        tied="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        max_length=header.get("context_length"),
        rope_theta=theta,
        rope_scaling=_scaling(source, header, key_size // 2, theta),
        norm_epsilon=_short(number("attention.layer_norm_rms_epsilon")),
        dtype=dtype,
    )


def _check_value(source: GGUFSource, name: str, key: str, value: Any) -> None:
    """Kind and range of a number of the header."""
    if key in _WHOLE and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _WHOLE[key]):
        raise UserError(f"{source.path}: {name} = {value!r}; expected a whole number from 1 to {_WHOLE[key]}.")
    least = 0.0 if key == "rope.scaling.factor" else math.ulp(0.0) if key in _POSITIVE else None
    if least is None:
        return
    if not (isinstance(value, float | int) and not isinstance(value, bool) and least <= value < math.inf):
        raise UserError(f"{source.path}: {name} = {value!r}; expected a finite number above 0.")


def _scaling(source: GGUFSource, header: Mapping[str, Any], half: int, theta: float) -> RopeScaling:
    """Scaling of the positions: by keys of the header, or by a tensor of factors (Llama 3.1)."""
    kind = header.get("rope.scaling.type", "linear")  # a factor without a type
    factor = _short(header.get("rope.scaling.factor", 0.0)) or 1.0  # 0: as it was
    if ROPE_FACTORS in source.names():
        return _llama3(source, half, theta)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor)
    length, magnitude = header.get("rope.scaling.original_context_length"), header.get("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" or length is None or magnitude != 1.0:
        raise UserError(
            f"{source.path}: rope.scaling.type = {kind!r} with original_context_length = {length}, attn_factor = "
            f"{magnitude}, which the decoder lacks; expected linear, or yarn with a length and 1.0."
        )
    return RopeScaling("yarn", factor, length)


def _llama3(source: GGUFSource, half: int, theta: float) -> RopeScaling:
    """The scaling whose factors the tensor holds; only the bounds of the published Llama 3.1 to 3.3 are known."""
    factors = source.get(ROPE_FACTORS)
    scaling = RopeScaling("llama3", max(float(np.max(factors)), 1.0), 8192)
    wanted = slowed(half, theta, RopeScaling("linear")) / slowed(half, theta, scaling)
    if factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-5):
        raise UserError(
            f"{source.path}: {ROPE_FACTORS} {factors.shape} is not that of Llama 3.1 (first trained on 8192 tokens), "
            f"the only one that is read; expected {wanted.shape} with the factor {scaling.factor:g}."
        )
    return scaling


def _short(value: float) -> float:
    """The shortest decimal number with the same float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def turned(transform: Transform) -> Transform:
    """A query or key, ours ``[..., H, K]``, whose K lies in another order in files of architecture llama.

    There the numbers that rotate together stand side by side, (0, K/2, 1, K/2 + 1, …); ours are half a head apart.

    Example:
      >>> there = np.array([0, 2, 1, 3, 4, 6, 5, 7])  # two heads of size 4
      >>> turned(flat).read(there, (2, 4)).tolist()
      [[0, 1, 2, 3], [4, 5, 6, 7]]
      >>> turned(flat).write(turned(flat).read(there, (2, 4))).tolist()
      [0, 2, 1, 3, 4, 6, 5, 7]
    """

    def halves(array: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(array.shape)

    def pairs(array: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(array.shape)

    return Transform(
        transform.shape,
        lambda array, shape: halves(transform.read(array, shape)),
        lambda array: transform.write(pairs(array)),
    )


def table_of(architecture: str, config: DecoderConfig) -> Table:
    """Where each parameter of this decoder stands in a GGUF file."""
    rotary = turned if architecture == "llama" else lambda transform: transform
    table: Table = {("embedding",): Row("token_embd.weight"), ("norm", "scale"): Row("output_norm.weight")}
    if not config.tied:
        table["head",] = Row("output.weight", linear())

    def layer(path: tuple[str, ...], name: str, transform: Transform | None = None) -> None:
        row = Row(f"blk.{{layer}}.{name}") if transform is None else Row(f"blk.{{layer}}.{name}", transform)
        table["layers", *path] = row

    layer(("attention_norm", "scale"), "attn_norm.weight")
    layer(("mlp_norm", "scale"), "ffn_norm.weight")
    for ours, theirs, order in (("query", "q", rotary), ("key", "k", rotary), ("value", "v", lambda same: same)):
        layer(("attention", ours, "kernel"), f"attn_{theirs}.weight", order(linear()))
        if config.qkv_bias:
            layer(("attention", ours, "bias"), f"attn_{theirs}.bias", order(flat))
    for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")) if config.qk_norm else ():
        layer(("attention", ours, "scale"), f"attn_{theirs}.weight")
    layer(("attention", "output", "kernel"), "attn_output.weight", linear(2))
    if config.output_bias:
        layer(("attention", "output", "bias"), "attn_output.bias")
    for name in ("gate", "up", "down"):
        layer(("mlp", name, "kernel"), f"ffn_{name}.weight", linear())
        if config.mlp_bias:
            layer(("mlp", name, "bias"), f"ffn_{name}.bias")
    return table


def opened(path: str | Path, activations: Literal["float32", "bfloat16"] = "float32") -> Opened:
    """A file with its configuration and its name table; its tensors are not read.

    Raises:
      UserError: an option of the file that the decoder lacks, named.
    """
    source = GGUFSource(path)
    config = config_of(source, activations)
    # The factors of Llama 3.1 are read into the configuration.
    return Opened(config, table_of(architecture_of(source), config), source, (re.escape(ROPE_FACTORS),))
