"""Keys, defaults and tensor names of Llama, which most families share."""

SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "feed_forward": "intermediate_size",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "max_length": "max_position_embeddings",
}
"""The usual names of sizes."""

ROTARY = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None}
ROTARY |= {"original_max_position_embeddings": None, "max_position_embeddings": 2048}
"""Defaults of what ``family.rotary`` reads."""

DEFAULTS = {
    "head_dim": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    **ROTARY,
}

IGNORED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")
"""In older files."""

COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
"""The head, where it is tied to the embedding."""

NAMES = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "layers/attention_norm": "input_layernorm",
    "layers/mlp_norm": "post_attention_layernorm",
    "layers/attention/query_norm": "self_attn.q_norm",
    "layers/attention/key_norm": "self_attn.k_norm",
    "layers/attention/query": "self_attn.q_proj",
    "layers/attention/key": "self_attn.k_proj",
    "layers/attention/value": "self_attn.v_proj",
    "layers/attention/output": "self_attn.o_proj",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}
"""The module a parameter belongs to → the module in the file."""

PREFIX = "model."

LAYER = "model.layers.{layer}."
