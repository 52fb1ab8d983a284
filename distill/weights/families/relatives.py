"""Phi-3 (arXiv 2404.14219), whose files join matrices, and OLMo 2 (arXiv 2501.00656), whose norms stand elsewhere."""

import dataclasses

from distill.models import DecoderConfig
from distill.weights.assemble import Part, Path, Row
from distill.weights.families import llama
from distill.weights.families.family import Family, Json, Keys, biases, only, rotary, rotary_keys, row

# ---- Phi-3

_JOINED = {"query": 0, "key": 1, "value": 2, "gate": 0, "up": 1}

_PHI3_NAMES = llama.NAMES | dict.fromkeys(
    ("layers/attention/query", "layers/attention/key", "layers/attention/value"), "self_attn.qkv_proj"
)
_PHI3_NAMES |= {"layers/mlp/gate": "mlp.gate_up_proj", "layers/mlp/up": "mlp.gate_up_proj"}


def _phi3_row(config: DecoderConfig, path: Path) -> Row:
    there = row(path, _PHI3_NAMES, llama.LAYER)
    index = _JOINED.get(path[-2]) if len(path) > 1 else None
    return there if index is None else dataclasses.replace(there, part=Part(index))


def _phi3(keys: Keys) -> Json:
    fraction = keys.get("partial_rotary_factor")
    fields = rotary(keys, 1.0 if fraction is None else fraction)
    kind = fields["rope_scaling"].kind
    if kind not in ("none", "longrope"):
        raise ValueError(f"config.json: rope_type={kind!r} of model_type 'phi3' is not supported; expected longrope.")
    return fields | {"sliding_window": keys.get("sliding_window")}


def _phi3_keys(c: DecoderConfig) -> Json:
    window = {"hidden_act": "silu", "sliding_window": c.sliding_window}
    if c.rope_scaling.kind == "longrope":
        window["original_max_position_embeddings"] = c.rope_scaling.original_length
    return rotary_keys(c, fraction=True) | window


# ---- OLMo 2

_OLMO2 = {"norm_place": "after", "qk_norm": True, "qk_norm_joint": True}

_OLMO2_NAMES = llama.NAMES | {
    "layers/attention_post_norm": "post_attention_layernorm",
    "layers/mlp_post_norm": "post_feedforward_layernorm",
}


FAMILIES: dict[str, Family] = {
    "phi3": Family(
        "Phi3ForCausalLM",
        llama.SIZES,
        llama.DEFAULTS
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
        | {"sliding_window": None, "partial_rotary_factor": None},
        _phi3,
        _phi3_keys,
        lambda c: only(c, "sliding_window", "rope_fraction") and c.rope_scaling.kind in ("none", "longrope"),
        _phi3_row,
        llama.IGNORED,
        frozenset({"auto_map", "embd_pdrop", "resid_pdrop"}),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        llama.SIZES,
        llama.DEFAULTS | {"rms_norm_eps": 1e-5},
        lambda keys: rotary(keys) | biases(keys) | _OLMO2,
        lambda c: {"hidden_act": "silu", "attention_bias": c.qkv_bias} | rotary_keys(c),
        lambda c: (
            all(getattr(c, name) == value for name, value in _OLMO2.items())
            and c.qkv_bias == c.output_bias
            and only(c, *_OLMO2, "qkv_bias", "output_bias")
        ),
        lambda config, path: row(path, _OLMO2_NAMES, llama.LAYER),
        llama.IGNORED,
    ),
}
