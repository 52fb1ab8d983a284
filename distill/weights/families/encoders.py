"""Encoders in and out of files: BERT (MiniLM is one), DistilBERT and ModernBERT.

The tensors of a file tell what it holds beside the encoder: with a head for masked tokens it is loaded with that head
(and without BERT's pooler, as ``BertForMaskedLM`` is), otherwise as the bare encoder.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from distill.errors import UserError, shown
from distill.models.config import EncoderConfig, RopeScaling
from distill.weights.families.family import (
    Family,
    activation,
    activation_key,
    beside,
    by_kind,
    every,
    has,
    layer_types,
    row,
    windowed_layers,
)
from distill.weights.families.keys import Json, Keys
from distill.weights.families.rope_json import from_rope_json, to_rope_json
from distill.weights.table import ParameterPath, Part, Row

_NEUTRAL = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
_POST_NORM = {
    "norm_place": "post",
    "positions": "learned",
    "gated": False,
    "sliding_window": None,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "norm_bias": True,
    "mlm_bias": True,
}


def _family(
    name: str,
    *,
    prefix: str,
    layer: str,
    names: dict[str, str],
    head: dict[str, str],
    keys: Callable[[EncoderConfig], Json],
    parts: Mapping[str, Part] | None = None,
    **fields,
) -> Family:
    """A family of encoders.

    Args:
      name: of its classes in transformers, ``{name}Model`` and ``{name}ForMaskedLM``.
      prefix: of the encoder's tensors where there is a head.
      layer: what stands before the names of a layer.
      names: the module a parameter belongs to → the module in the file.
      head: the same for the head; its names take no prefix.
      keys: the inverse of ``options``.
      parts: as for ``row``.
      **fields: the others of ``Family``.
    """

    def place(config: EncoderConfig, path: ParameterPath) -> Row:
        there = row(path, names | head, layer, parts=parts)
        bare = path[0] in head or not config.mlm_head
        return there if bare else dataclasses.replace(there, name=prefix + there.name)

    def by_tensors(tensors: set[str]) -> Json:
        mlm = f"{head['transform']}.weight" in tensors
        pooler = "pooler" in names and f"{names['pooler']}.weight" in tensors and not mlm
        return {"mlm_head": mlm, "pooler": pooler} | ({} if mlm else {"mlm_bias": True})

    def all_keys(c: EncoderConfig) -> Json:
        return {"architectures": [name + ("ForMaskedLM" if c.mlm_head else "Model")]} | keys(c)

    return Family(
        config=EncoderConfig,
        architecture=f"{name}Model",
        row=place,
        keys=all_keys,
        by_tensors=by_tensors,
        derived=lambda c: {},
        constant={"tie_word_embeddings": True},
        neutral=_NEUTRAL,
        ignored_by=lambda c: (r"pooler\.dense\.(weight|bias)",) if c.mlm_head else (),
        prefix=prefix,
        rename=_renamed,
        **fields,
    )


def _renamed(name: str) -> str:
    """PyTorch's names of norms; older files have gamma and beta."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


# ---- BERT


def _bert(keys: Keys) -> Json:
    keys.neutral("position_embedding_type", "absolute")
    return {"activation": activation("hidden_act", keys.get("hidden_act"), _ACTIVATIONS)}


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

# ---- DistilBERT

_DISTILBERT_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "n_layers",
    "width": "dim",
    "heads": "n_heads",
    "feed_forward": "hidden_dim",
    "max_length": "max_position_embeddings",
}

# ---- ModernBERT

_MODERNBERT = {"norm_place": "pre", "positions": "rotary", "gated": True}
_MODERNBERT_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "norm_eps",
    "norm_bias": "norm_bias",
    "mlp_bias": "mlp_bias",
    "mlm_bias": "classifier_bias",
}


def _modernbert(keys: Keys) -> Json:
    layers, step = keys.get("num_hidden_layers"), keys.get("global_attn_every_n_layers")
    kinds, window = keys.get("layer_types"), keys.get("local_attention")
    if step is None and kinds is None:
        raise UserError("config.json: global_attn_every_n_layers=None without layer_types; expected one of them.")
    local = windowed_layers(layers, kinds, lambda n: n % step != 0)
    thetas = _thetas(keys)
    kind, of_head = (
        activation(key, keys.get(key), _ACTIVATIONS) for key in ("hidden_activation", "classifier_activation")
    )
    if kind != of_head:
        raise UserError(
            f"config.json: classifier_activation={shown(keys.get('classifier_activation'))}; expected that of the "
            f"layers, {keys.get('hidden_activation')!r}."
        )
    keys.neutral("decoder_bias", True)
    windows = {"sliding_window": window // 2, "window_layers": local} if any(local) else {}
    bias = keys.get("attention_bias")
    fields = {"qkv_bias": bias, "output_bias": bias, "activation": kind}
    return _MODERNBERT | windows | fields | dict(zip(("rope_theta", "rope_theta_local"), thetas, strict=True))


def _thetas(keys: Keys) -> list[float]:
    """Theta of layers without a window, and of those with one, in either spelling."""
    keys.neutral("rope_scaling", None)
    newer, thetas = by_kind(keys), []
    for kind, theta in {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}.items():
        fields = from_rope_json(None, newer[kind], beside(keys, theta))
        if fields["rope_scaling"].kind != "none":
            raise UserError(
                f"config.json: rope_parameters of {kind}: {shown(newer[kind])}; expected rope_type 'default'."
            )
        thetas.append(fields["rope_theta"])
    return thetas


def _modernbert_keys(c: EncoderConfig) -> Json:
    kind = activation_key(c)
    thetas = {"full_attention": c.rope_theta, "sliding_attention": c.rope_theta_local}
    return {
        "hidden_activation": kind,
        "classifier_activation": kind,
        "attention_bias": c.qkv_bias,
        "layer_types": layer_types(c),
        "local_attention": 128 if c.sliding_window is None else 2 * c.sliding_window,
        "global_attn_every_n_layers": every(c, shift=0),
        "rope_parameters": {kind: to_rope_json(theta, RopeScaling()) for kind, theta in thetas.items()},
        "global_rope_theta": c.rope_theta,
        "local_rope_theta": c.rope_theta_local,
    }


def _first_norm(c: EncoderConfig) -> dict[str, np.ndarray]:
    """The attention norm of the first layer, which the stacked parameters have and the network never uses."""
    values = {"weight": 1.0, "bias": 0.0} if c.norm_bias else {"weight": 1.0}
    return {f"layers.0.attn_norm.{kind}": np.full(c.width, value, np.float32) for kind, value in values.items()}


FAMILIES: dict[str, Family] = {
    "bert": _family(
        "Bert",
        prefix="bert.",
        layer="encoder.layer.{layer}.",
        names={
            "embedding": "embeddings.word_embeddings",
            "positions": "embeddings.position_embeddings",
            "types": "embeddings.token_type_embeddings",
            "embedding_norm": "embeddings.LayerNorm",
            "layers/attention/query": "attention.self.query",
            "layers/attention/key": "attention.self.key",
            "layers/attention/value": "attention.self.value",
            "layers/attention/output": "attention.output.dense",
            "layers/attention_norm": "attention.output.LayerNorm",
            "layers/mlp/up": "intermediate.dense",
            "layers/mlp/down": "output.dense",
            "layers/mlp_norm": "output.LayerNorm",
            "pooler": "pooler.dense",
        },
        head={
            "transform": "cls.predictions.transform.dense",
            "transform_norm": "cls.predictions.transform.LayerNorm",
            "head_bias": "cls.predictions",
        },
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        ignored=(
            r"embeddings\.position_ids",
            r"cls\.predictions\.decoder\.(weight|bias)",
            r"cls\.seq_relationship\..*",
        ),
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
                "sbert_ce_default_activation_function",
                *("cell", "emb_size", "pre_trained", "structure", "training"),  # of TinyBERT
            }
        ),
        sizes=_BERT_SIZES,
        defaults={"hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
        options=_bert,
        keys=lambda c: {"hidden_act": activation_key(c)},
        expresses=lambda c: has(c, _POST_NORM) and c.token_types > 0 and not (c.pooler and c.mlm_head),
    ),
    "distilbert": _family(
        "DistilBert",
        prefix="distilbert.",
        layer="transformer.layer.{layer}.",
        names={
            "embedding": "embeddings.word_embeddings",
            "positions": "embeddings.position_embeddings",
            "embedding_norm": "embeddings.LayerNorm",
            "layers/attention/query": "attention.q_lin",
            "layers/attention/key": "attention.k_lin",
            "layers/attention/value": "attention.v_lin",
            "layers/attention/output": "attention.out_lin",
            "layers/attention_norm": "sa_layer_norm",
            "layers/mlp/up": "ffn.lin1",
            "layers/mlp/down": "ffn.lin2",
            "layers/mlp_norm": "output_layer_norm",
        },
        head={
            "transform": "vocab_transform",
            "transform_norm": "vocab_layer_norm",
            "head_bias": "vocab_projector",
        },
        copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        ignored=(r"vocab_projector\.weight", r"embeddings\.position_ids"),
        harmless=frozenset({"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"}),
        sizes=_DISTILBERT_SIZES,
        defaults={"activation": "gelu", "max_position_embeddings": 512},
        options=lambda keys: {"activation": activation("activation", keys.get("activation"), _ACTIVATIONS)},
        keys=lambda c: {"activation": activation_key(c)},
        expresses=lambda c: has(c, _POST_NORM | {"token_types": 0, "pooler": False, "norm_epsilon": 1e-12}),
    ),
    "modernbert": _family(
        "ModernBert",
        prefix="model.",
        layer="layers.{layer}.",
        names={
            "embedding": "embeddings.tok_embeddings",
            "embedding_norm": "embeddings.norm",
            "layers/attention/query": "attn.Wqkv",
            "layers/attention/key": "attn.Wqkv",
            "layers/attention/value": "attn.Wqkv",
            "layers/attention/output": "attn.Wo",
            "layers/attention_norm": "attn_norm",
            "layers/mlp/gate": "mlp.Wi",
            "layers/mlp/up": "mlp.Wi",
            "layers/mlp/down": "mlp.Wo",
            "layers/mlp_norm": "mlp_norm",
            "norm": "final_norm",
        },
        head={"transform": "head.dense", "transform_norm": "head.norm", "head_bias": "decoder"},
        copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        ignored=(r"decoder\.weight",),
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
        parts={"query": Part(0), "key": Part(1), "value": Part(2), "gate": Part(0), "up": Part(1)},
        absent=_first_norm,
        sizes=_MODERNBERT_SIZES,
        defaults={
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
            "original_max_position_embeddings": None,
            "global_rope_theta": 160_000.0,
            "local_rope_theta": 10_000.0,
        },
        options=_modernbert,
        keys=_modernbert_keys,
        expresses=lambda c: has(c, _MODERNBERT | {"token_types": 0, "pooler": False}) and c.qkv_bias == c.output_bias,
    ),
}
"""``model_type`` → family: an encoder is saved as the first that has all its options."""
