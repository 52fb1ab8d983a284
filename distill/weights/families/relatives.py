"""Phi-3 (arXiv 2404.14219), whose files join matrices, and OLMo 2 (arXiv 2501.00656), which normalises outputs."""

from distill.errors import UserError
from distill.models.config import DecoderConfig
from distill.weights.families import usual
from distill.weights.families.family import Family, biases, has, lengths, only, rotary, rotary_keys, row
from distill.weights.families.keys import Json, Keys
from distill.weights.families.rope_json import to_phi3_json
from distill.weights.table import Part

# ---- Phi-3

_PARTS = {"query": Part(0), "key": Part(1), "value": Part(2), "gate": Part(0), "up": Part(1)}

_PHI3_NAMES = usual.NAMES | dict.fromkeys(
    ("layers/attention/query", "layers/attention/key", "layers/attention/value"), "self_attn.qkv_proj"
)
_PHI3_NAMES |= {"layers/mlp/gate": "mlp.gate_up_proj", "layers/mlp/up": "mlp.gate_up_proj"}


def _phi3(keys: Keys) -> Json:
    fields = rotary(keys, fraction="partial_rotary_factor", usual=1.0)
    for key, value in {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}.items():  # of Phi-4-mini
        keys.neutral(key, value)
    kind = fields["rope_scaling"].kind
    if kind not in ("none", "longrope"):
        raise UserError(f"config.json: rope_type={kind!r} of model_type 'phi3' is not supported; expected longrope.")
    return fields | {"sliding_window": keys.get("sliding_window")}


def _phi3_keys(c: DecoderConfig) -> Json:
    scaling, length = c.rope_scaling, lengths(c)["max_length"]
    older = to_phi3_json(scaling, length)
    return rotary_keys(c, fraction="partial_rotary_factor") | {
        "hidden_act": "silu",
        "sliding_window": c.sliding_window,
        "original_max_position_embeddings": scaling.original_length or length,
        **({} if older is None else {"rope_scaling": older}),
    }


# ---- OLMo 2

_OLMO2 = {"norm_place": "after", "qk_norm": True, "qk_norm_joint": True}

_OLMO2_NAMES = usual.NAMES | {
    "layers/attention_post_norm": "post_attention_layernorm",
    "layers/mlp_post_norm": "post_feedforward_layernorm",
}


FAMILIES: dict[str, Family] = {
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        sizes=usual.SIZES,
        defaults=usual.DEFAULTS
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
        | {"sliding_window": None},
        options=_phi3,
        keys=_phi3_keys,
        expresses=lambda c: (
            only(c, "sliding_window", "rope_fraction")
            and c.rope_scaling.kind in ("none", "longrope")
            # transformers counts LongRoPE's factors by hidden_size / heads
            and (c.rope_scaling.kind == "none" or c.key_size * c.heads == c.width)
        ),
        row=lambda config, path: row(path, _PHI3_NAMES, usual.LAYER, parts=_PARTS),
        ignored=usual.IGNORED,
        prefix=usual.PREFIX,
        copies=usual.COPIES,
        harmless=frozenset({"auto_map", "embd_pdrop", "resid_pdrop"}),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        sizes=usual.SIZES,
        defaults=usual.DEFAULTS | {"rms_norm_eps": 1e-5},
        options=lambda keys: rotary(keys) | biases(keys) | _OLMO2,
        keys=lambda c: {"hidden_act": "silu", "attention_bias": c.qkv_bias} | rotary_keys(c),
        expresses=lambda c: (
            has(c, _OLMO2) and c.qkv_bias == c.output_bias and only(c, *_OLMO2, "qkv_bias", "output_bias")
        ),
        row=lambda config, path: row(path, _OLMO2_NAMES, usual.LAYER),
        ignored=usual.IGNORED,
        prefix=usual.PREFIX,
        copies=usual.COPIES,
    ),
}
