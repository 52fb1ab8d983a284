"""GPT-2 and GPT-NeoX (arXiv 2204.06745), Pythia among them: LayerNorm, no gate, one matrix for all of q, k and v."""

from distill.models.config import DecoderConfig
from distill.weights.families.family import (
    Family,
    activation,
    activation_key,
    biases,
    has,
    only,
    rotary,
    rotary_keys,
    row,
)
from distill.weights.families.keys import Json, Keys
from distill.weights.families.usual import ROTARY
from distill.weights.table import ParameterPath, Part, Row, conv1d

_ALWAYS = {"norm": "layer", "gated": False, "mlp_bias": True}


def _has(c: DecoderConfig, always: Json, *options: str) -> bool:
    plain = c.groups == c.heads and c.key_size * c.heads == c.width
    return plain and has(c, always) and only(c, *always, *options)


# ---- GPT-2

_GPT2_ALWAYS = _ALWAYS | {"positions": "learned", "qkv_bias": True, "output_bias": True}

_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "position": "transformer.wpe",
    "head": "lm_head",
    "norm": "transformer.ln_f",
    "layers/attention_norm": "ln_1",
    "layers/mlp_norm": "ln_2",
    "layers/attention/query": "attn.c_attn",
    "layers/attention/key": "attn.c_attn",
    "layers/attention/value": "attn.c_attn",
    "layers/attention/output": "attn.c_proj",
    "layers/mlp/up": "mlp.c_fc",
    "layers/mlp/down": "mlp.c_proj",
}

_GPT2_HARMLESS = {
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "gradient_checkpointing",
    "n_ctx",
    "predict_special_tokens",
}
_GPT2_HARMLESS |= {"summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"}
_GPT2_HARMLESS |= {"summary_use_proj"}


def _gpt2_row(config: DecoderConfig, path: ParameterPath) -> Row:
    parts = {"query": Part(0, axis=-1), "key": Part(1, axis=-1), "value": Part(2, axis=-1)}
    return row(path, _GPT2_NAMES, "transformer.h.{layer}.", matrix=conv1d, parts=parts)


def _gpt2(keys: Keys) -> Json:
    keys.neutral("scale_attn_weights", True)
    keys.neutral("scale_attn_by_inverse_layer_idx", False)
    keys.neutral("reorder_and_upcast_attn", False, True)  # the same in another order
    keys.neutral("n_special", 0)
    kind = activation("activation_function", keys.get("activation_function"))
    inner = keys.get("n_inner")
    wide = 4 * keys.get("n_embd") if inner is None else inner
    return _GPT2_ALWAYS | {"activation": kind, "feed_forward": wide}


def _gpt2_keys(c: DecoderConfig) -> Json:
    kind = "gelu_new" if c.activation == "gelu_tanh" else activation_key(c)
    return {
        "n_inner": c.feed_forward,
        "activation_function": kind,
        "n_ctx": c.max_length,
    }  # n_ctx: for mlx-lm, llama.cpp


# ---- GPT-NeoX

_NEOX_NAMES = {
    "embedding": "gpt_neox.embed_in",
    "head": "embed_out",
    "norm": "gpt_neox.final_layer_norm",
    "layers/attention_norm": "input_layernorm",
    "layers/mlp_norm": "post_attention_layernorm",
    "layers/attention/query": "attention.query_key_value",
    "layers/attention/key": "attention.query_key_value",
    "layers/attention/value": "attention.query_key_value",
    "layers/attention/output": "attention.dense",
    "layers/mlp/up": "mlp.dense_h_to_4h",
    "layers/mlp/down": "mlp.dense_4h_to_h",
}


def _neox_row(config: DecoderConfig, path: ParameterPath) -> Row:
    parts = {name: Part(n, blocks=config.heads) for n, name in enumerate(("query", "key", "value"))}
    return row(path, _NEOX_NAMES, "gpt_neox.layers.{layer}.", parts=parts)


def _neox(keys: Keys) -> Json:
    kind = activation("hidden_act", keys.get("hidden_act"))
    fields = rotary(keys, "rotary_emb_base", "rotary_pct", usual=0.25) | biases(keys) | _ALWAYS
    keys.neutral("rope_theta", fields["rope_theta"])  # transformers 4 writes theta and the fraction under both names
    keys.neutral("partial_rotary_factor", fields["rope_fraction"])
    return fields | {"activation": kind, "parallel": keys.get("use_parallel_residual")}


def _neox_keys(c: DecoderConfig) -> Json:
    own = {"hidden_act": activation_key(c), "attention_bias": c.qkv_bias, "use_parallel_residual": c.parallel}
    twice = {"rope_theta": c.rope_theta, "partial_rotary_factor": c.rope_fraction}
    return rotary_keys(c, "rotary_emb_base", "rotary_pct") | twice | own


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        sizes={
            "vocab_size": "vocab_size",
            "layers": "n_layer",
            "width": "n_embd",
            "heads": "n_head",
            "tied": "tie_word_embeddings",
            "norm_epsilon": "layer_norm_epsilon",
            "max_length": "n_positions",
        },
        defaults={
            "n_positions": 1024,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        options=_gpt2,
        keys=_gpt2_keys,
        expresses=lambda c: _has(c, _GPT2_ALWAYS, "activation"),
        row=_gpt2_row,
        ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
        harmless=frozenset(_GPT2_HARMLESS),
        prefix="transformer.",
        copies={"lm_head.weight": "transformer.wte.weight"},
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        sizes={
            "vocab_size": "vocab_size",
            "layers": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "feed_forward": "intermediate_size",
            "tied": "tie_word_embeddings",
            "norm_epsilon": "layer_norm_eps",
            "max_length": "max_position_embeddings",
        },
        defaults={
            **ROTARY,
            "rotary_emb_base": 10_000.0,
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "hidden_act": "gelu",
        },
        options=_neox,
        keys=_neox_keys,
        expresses=lambda c: (
            c.qkv_bias == c.output_bias
            and _has(c, _ALWAYS, "qkv_bias", "output_bias", "activation", "parallel", "rope_fraction")
        ),
        row=_neox_row,
        ignored=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
        prefix="gpt_neox.",
        rename=lambda name: name.replace("lm_head.", "embed_out.") if name.startswith("lm_head.") else name,
        copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
        harmless=frozenset(
            {"attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout", "hidden_dropout_prob"}
        ),
    ),
}
