"""Encoders in and out of files: BERT (MiniLM is one), DistilBERT and ModernBERT.

What a file holds beside the encoder is told by its tensors: with a head for masked words it is loaded with that head
(and without BERT's pooler, as ``BertForMaskedLM`` is), else as the bare encoder.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.models.encoder import EncoderConfig
from distill.shapes import Params
from distill.weights.assemble import Part, Row, Table, assemble, disassemble, flat, linear, same, shapes_of
from distill.weights.assemble import Path as Parameter
from distill.weights.families.family import HARMLESS, Json, Keys
from distill.weights.place import Place
from distill.weights.safetensors import SafetensorsSource


class EncoderFamily(NamedTuple):
    """What is particular to one ``model_type``."""

    architectures: tuple[str, str]
    """Names of the classes in transformers: the bare encoder, and with a head for masked words."""
    prefix: str
    """Of the encoder's tensors where there is a head."""
    names: dict[str, str]
    """Parameter, or the module it belongs to → tensor, ``name[0]``, ``name[1]`` for the parts of one matrix; those of
    layers are behind ``layers``."""
    layers: str
    head: dict[str, str]
    """The same for the head; its names take no prefix."""
    ignored: tuple[str, ...]
    """Regular expressions of tensors that are computed, or tied to the embedding."""
    fields: Callable[[Keys], Json]
    """Fields of ``EncoderConfig`` from ``config.json``."""
    keys: Callable[[EncoderConfig], Json]
    """The inverse of ``fields``."""
    expresses: Callable[[EncoderConfig], bool]
    """Whether this family has all of an encoder's options."""
    harmless: frozenset[str]
    """Keys of this family that change no state and no logit."""


_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _activation(keys: Keys, key: str) -> str:
    value = keys.get(key)
    if value not in _ACTIVATIONS:
        raise ValueError(f"config.json: {key}={value!r} is not supported; expected one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[value]


def _same_number(sizes: dict[str, str]) -> tuple[Callable[[Keys], Json], Callable[[EncoderConfig], Json]]:
    """Both ways for fields that are one number in a key of another name."""
    return (
        lambda keys: {field: keys.get(key) for field, key in sizes.items()},
        lambda c: {key: getattr(c, field) for field, key in sizes.items()},
    )


def _post_norm(c: EncoderConfig) -> bool:
    biases = c.attention_bias and c.mlp_bias and c.norm_bias and c.mlm_bias
    return c.norm == "post" and c.positions == "learned" and not c.gated and c.window is None and biases


_BERT_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "max_length": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_epsilon": "layer_norm_eps",
}


def _bert() -> EncoderFamily:
    read, write = _same_number(_BERT_SIZES)

    def fields(keys: Keys) -> Json:
        keys.neutral("position_embedding_type", "absolute")
        return read(keys) | {"activation": _activation(keys, "hidden_act")}

    return EncoderFamily(
        architectures=("BertModel", "BertForMaskedLM"),
        prefix="bert.",
        names={
            "embedding": "embeddings.word_embeddings.weight",
            "positions": "embeddings.position_embeddings.weight",
            "types": "embeddings.token_type_embeddings.weight",
            "embedding_norm": "embeddings.LayerNorm",
            "attention/query": "attention.self.query",
            "attention/key": "attention.self.key",
            "attention/value": "attention.self.value",
            "attention/output": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "mlp/up": "intermediate.dense",
            "mlp/down": "output.dense",
            "mlp_norm": "output.LayerNorm",
            "pooler": "pooler.dense",
        },
        layers="encoder.layer.{layer}.",
        head={
            "transform": "cls.predictions.transform.dense",
            "transform_norm": "cls.predictions.transform.LayerNorm",
            "head_bias": "cls.predictions.bias",
        },
        ignored=(
            r"embeddings\.position_ids",
            r"cls\.predictions\.decoder\.(weight|bias)",
            r"cls\.seq_relationship\..*",
        ),
        fields=fields,
        keys=lambda c: write(c) | {"hidden_act": _ACTIVATION_NAMES[c.activation]},
        expresses=lambda c: _post_norm(c) and c.token_types > 0 and not (c.pooler and c.mlm_head),
        harmless=frozenset(
            {
                "attention_probs_dropout_prob",
                "hidden_dropout_prob",
                "classifier_dropout",
                "gradient_checkpointing",
                "directionality",
                "pooler_fc_size",
                "pooler_num_attention_heads",
                "pooler_num_fc_layers",
                "pooler_size_per_head",
                "pooler_type",
            }
        ),
    )


_DISTILBERT_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "n_layers",
    "width": "dim",
    "heads": "n_heads",
    "feed_forward": "hidden_dim",
    "max_length": "max_position_embeddings",
}


def _distilbert() -> EncoderFamily:
    read, write = _same_number(_DISTILBERT_SIZES)
    return EncoderFamily(
        architectures=("DistilBertModel", "DistilBertForMaskedLM"),
        prefix="distilbert.",
        names={
            "embedding": "embeddings.word_embeddings.weight",
            "positions": "embeddings.position_embeddings.weight",
            "embedding_norm": "embeddings.LayerNorm",
            "attention/query": "attention.q_lin",
            "attention/key": "attention.k_lin",
            "attention/value": "attention.v_lin",
            "attention/output": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "mlp/up": "ffn.lin1",
            "mlp/down": "ffn.lin2",
            "mlp_norm": "output_layer_norm",
        },
        layers="transformer.layer.{layer}.",
        head={
            "transform": "vocab_transform",
            "transform_norm": "vocab_layer_norm",
            "head_bias": "vocab_projector.bias",
        },
        ignored=(r"vocab_projector\.weight", r"embeddings\.position_ids"),
        fields=lambda keys: read(keys) | {"activation": _activation(keys, "activation")},
        keys=lambda c: write(c) | {"activation": _ACTIVATION_NAMES[c.activation]},
        expresses=lambda c: _post_norm(c) and c.token_types == 0 and not c.pooler and c.norm_epsilon == 1e-12,
        harmless=frozenset({"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"}),
    )


_MODERNBERT_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "norm_eps",
    "norm_bias": "norm_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "mlm_bias": "classifier_bias",
}


def _modernbert_fields(keys: Keys) -> Json:
    layers, every = keys.get("num_hidden_layers"), keys.get("global_attn_every_n_layers")
    kinds, window = keys.get("layer_types"), keys.get("local_attention")
    if kinds is None:
        kinds = ["sliding_attention" if n % every else "full_attention" for n in range(layers)]
    if set(kinds) - {"sliding_attention", "full_attention"} or len(kinds) != layers:
        raise ValueError(
            f"config.json: layer_types={kinds!r}; expected sliding_attention or full_attention for {layers} layers."
        )
    local = tuple(kind == "sliding_attention" for kind in kinds)
    keys.neutral("rope_scaling", None)
    thetas = [keys.get("global_rope_theta"), keys.get("local_rope_theta")]
    for i, kind in enumerate(("full_attention", "sliding_attention")):
        rope = dict((keys.get("rope_parameters") or {}).get(kind) or {})
        thetas[i] = rope.pop("rope_theta", thetas[i])
        if rope.pop("rope_type", "default") != "default" or rope:
            raise ValueError(
                f"config.json: rope_parameters of {kind}: {keys.get('rope_parameters')[kind]!r}; expected "
                "rope_type 'default' and a rope_theta."
            )
    acts = [_activation(keys, key) for key in ("hidden_activation", "classifier_activation")]
    if acts[0] != acts[1]:
        raise ValueError(
            f"config.json: classifier_activation={keys.get('classifier_activation')!r}; expected that of the layers, "
            f"{keys.get('hidden_activation')!r}."
        )
    keys.neutral("decoder_bias", True)
    windows = {"window": window // 2, "window_layers": local} if any(local) else {}
    return windows | {"rope_theta": thetas[0], "local_theta": thetas[1], "activation": acts[0]}


def _modernbert_keys(c: EncoderConfig) -> Json:
    name = _ACTIVATION_NAMES[c.activation]
    thetas = {"full_attention": c.rope_theta, "sliding_attention": c.local_theta}
    local = c.window_layers or (False,) * c.layers
    return {
        "hidden_activation": name,
        "classifier_activation": name,
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in local],
        "local_attention": 128 if c.window is None else 2 * c.window,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    }


def _modernbert() -> EncoderFamily:
    read, write = _same_number(_MODERNBERT_SIZES)
    options = {"norm": "pre", "positions": "rotary", "gated": True}
    return EncoderFamily(
        architectures=("ModernBertModel", "ModernBertForMaskedLM"),
        prefix="model.",
        names={
            "embedding": "embeddings.tok_embeddings.weight",
            "embedding_norm": "embeddings.norm",
            "attention/query": "attn.Wqkv[0]",
            "attention/key": "attn.Wqkv[1]",
            "attention/value": "attn.Wqkv[2]",
            "attention/output": "attn.Wo",
            "attention_norm": "attn_norm",
            "mlp/gate": "mlp.Wi[0]",
            "mlp/up": "mlp.Wi[1]",
            "mlp/down": "mlp.Wo",
            "mlp_norm": "mlp_norm",
            "norm": "final_norm",
        },
        layers="layers.{layer}.",
        head={"transform": "head.dense", "transform_norm": "head.norm", "head_bias": "decoder.bias"},
        ignored=(r"decoder\.weight",),
        fields=lambda keys: read(keys) | options | _modernbert_fields(keys),
        keys=lambda c: write(c) | _modernbert_keys(c),
        expresses=lambda c: (
            all(getattr(c, name) == value for name, value in options.items()) and not c.token_types and not c.pooler
        ),
        harmless=frozenset(
            {
                "classifier_dropout",
                "classifier_pooling",
                "cls_token_id",
                "deterministic_flash_attn",
                "embedding_dropout",
                "gradient_checkpointing",
                "initializer_cutoff_factor",
                "layer_norm_eps",
                "mlp_dropout",
                "position_embedding_type",
                "reference_compile",
                "repad_logits_with_grad",
                "sep_token_id",
                "sparse_pred_ignore_index",
                "sparse_prediction",
            }
        ),
    )


ENCODERS: dict[str, EncoderFamily] = {"bert": _bert(), "distilbert": _distilbert(), "modernbert": _modernbert()}
"""``model_type`` → family: an encoder is saved as the first that has all it needs."""

_DEFAULTS: dict[str, Json] = {
    "bert": {"hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "distilbert": {"activation": "gelu", "max_position_embeddings": 512},
    "modernbert": {
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "local_attention": 128,
        "layer_types": None,
        "global_attn_every_n_layers": 3,
        "rope_parameters": None,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
    },
}
_NEUTRAL = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "tie_word_embeddings": (True,),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False, True),
}


# ---- config.json


def from_json(values: Json, names: set[str]) -> EncoderConfig:
    """The encoder a ``config.json`` describes, with the head or pooler that tensors of these names are of.

    Raises:
      ValueError: a key that is missing, not known, or has a value not supported here.
    """
    kind = values["model_type"]
    family, keys = ENCODERS[kind], Keys(values, _DEFAULTS[kind])
    fields = family.fields(keys)
    for key, allowed in _NEUTRAL.items():
        keys.neutral(key, *allowed)
    understood = keys.seen | HARMLESS | family.harmless
    unknown = [f"{key}={value!r}" for key, value in values.items() if key not in understood]
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} of model_type {kind!r}: not known, and it might matter.")
    there = {_canonical(name, family) for name in names}
    mlm = f"{family.head['transform']}.weight" in there
    pooler = "pooler" in family.names and f"{family.names['pooler']}.weight" in there and not mlm
    if not mlm:
        fields.pop("mlm_bias", None)
    return EncoderConfig(**fields, mlm_head=mlm, pooler=pooler)


def family_of(config: EncoderConfig, family: str | None = None) -> str:
    """The ``model_type`` an encoder is saved as: the one asked for, or the first that has all its options.

    Raises:
      ValueError: none has, or not the one asked for.
    """
    able = [name for name, one in ENCODERS.items() if one.expresses(config)]
    if family is None and able:
        return able[0]
    if family in able:
        return family
    asked = f"family {family!r} does not have" if family else f"no family among {', '.join(ENCODERS)} has"
    raise ValueError(f"{asked} all options of {config}.")


def to_json(config: EncoderConfig, family: str | None = None, dtype: str = "float32") -> Json:
    """The ``config.json`` of an encoder, as transformers reads it.

    Raises:
      ValueError: as ``family_of``.
    """
    name = family_of(config, family)
    return {
        "architectures": [ENCODERS[name].architectures[int(config.mlm_head)]],
        "model_type": name,
        "dtype": dtype,
        **ENCODERS[name].keys(config),
        "tie_word_embeddings": True,
    }


# ---- tensors


def table_of(config: EncoderConfig, family: str | None = None) -> Table:
    """The names of an encoder's tensors, without a prefix."""
    chosen = ENCODERS[family_of(config, family)]
    return {path: _row(path, chosen) for path in shapes_of(config)}


def _row(path: Parameter, family: EncoderFamily) -> Row:
    inside = path[1:] if path[0] == "layers" else path
    key = "/".join(inside)
    known = family.names | family.head
    prefix = family.layers if path[0] == "layers" else ""
    if key in known:  # an array of its own: embeddings, the bias of the head
        return Row(prefix + known[key], same)
    module, index = re.fullmatch(r"([^\[]+)(?:\[(\d)\])?", known["/".join(inside[:-1])]).groups()
    name, part = f"{prefix}{module}.{'bias' if path[-1] == 'bias' else 'weight'}", index and Part(int(index))
    if path[-1] == "kernel":
        return Row(name, linear(2 if inside[-2] == "output" else 1), part)
    return Row(name, flat if path[-1] == "bias" and inside[-2] in ("query", "key", "value") else same, part)


def _canonical(name: str, family: EncoderFamily) -> str:
    """A tensor's name without prefix, norms named as PyTorch does (older files: gamma and beta)."""
    name = name.removeprefix(family.prefix)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


class _View:
    """The tensors of a file by the names of ``table_of``; the first pre-norm layer has an attention norm."""

    def __init__(self, source: SafetensorsSource, family: EncoderFamily, config: EncoderConfig):
        self.source, self.width, self.at, self.made = source, config.width, {}, _made(config)
        for name in source.names():
            canonical = _canonical(name, family)
            if canonical in self.at:
                raise ValueError(f"the file has {name} and {self.at[canonical]}, which are one tensor; expected one.")
            self.at[canonical] = name
        if self.made & self.at.keys():
            raise ValueError(f"the file has {min(self.made & self.at.keys())}; the first layer should have none.")

    def names(self) -> set[str]:
        return set(self.at) | self.made

    def get(self, name: str) -> np.ndarray:
        if name in self.made:
            return np.full(self.width, float(name.endswith("weight")), np.float32)
        return self.source.get(self.at[name])


def _made(config: EncoderConfig) -> set[str]:
    """Tensors of the layer stack that no file has."""
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return {f"layers.0.attn_norm.{kind}" for kind in kinds} if config.norm == "pre" else set()


def tensors(config: EncoderConfig, family: str, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """``(name, array)`` of every tensor of a file that transformers opens as this family."""
    chosen, table = ENCODERS[family], table_of(config, family)
    heads = {row.name for path, row in table.items() if path[0] in chosen.head}
    prefix = chosen.prefix if config.mlm_head else ""
    for name, array in disassemble(config, table, params):
        if name not in _made(config):
            yield (name if name in heads else prefix + name), array


def read_config(folder: Path, values: Json) -> EncoderConfig:
    """The encoder of a folder whose ``config.json`` holds ``values``; its weights are named, not read."""
    return from_json(values, SafetensorsSource(folder).names())


def read(folder: Path, config: EncoderConfig, kind: str, place: Place, dtype: Any) -> Params:
    """The parameters of an encoder from a folder of ``model_type`` kind."""
    family = ENCODERS[kind]
    ignored = (*family.ignored, r"pooler\.dense\.(weight|bias)") if config.mlm_head else family.ignored
    view = _View(SafetensorsSource(folder), family, config)
    return assemble(config, table_of(config, kind), view, place, dtype=dtype, ignored=ignored)
