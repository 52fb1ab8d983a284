"""Llama's relatives whose layers are mixtures of experts: Mixtral and Qwen3-MoE."""

from collections.abc import Callable

from distill.errors import UserError, shown
from distill.models.config import DecoderConfig
from distill.weights.families.family import Family, biases, only, rotary, rotary_keys, row
from distill.weights.families.keys import Json, Keys
from distill.weights.families.usual import COPIES, DEFAULTS, IGNORED, LAYER, NAMES, PREFIX, SIZES
from distill.weights.table import ParameterPath, Row

_MIXTRAL = {
    "layers/mlp/router": "block_sparse_moe.gate",
    "layers/mlp/gate": "block_sparse_moe.experts.{expert}.w1",
    "layers/mlp/up": "block_sparse_moe.experts.{expert}.w3",
    "layers/mlp/down": "block_sparse_moe.experts.{expert}.w2",
}
_QWEN = {
    "layers/mlp/router": "mlp.gate",
    "layers/mlp/gate": "mlp.experts.{expert}.gate_proj",
    "layers/mlp/up": "mlp.experts.{expert}.up_proj",
    "layers/mlp/down": "mlp.experts.{expert}.down_proj",
}
_OPTIONS = ("experts", "experts_per_token", "normalize_experts", "router_loss_weight", "sliding_window")


def _named(names: dict[str, str]) -> Callable[[DecoderConfig, ParameterPath], Row]:
    return lambda config, path: row(path, NAMES | names, LAYER)


def _experts(keys: Keys) -> int:
    """The number of experts, under either key."""
    count, local = keys.get("num_experts"), keys.get("num_local_experts")
    if count is not None and local is not None and count != local:
        raise UserError(f"config.json: num_experts={count} and num_local_experts={local}; expected one number.")
    return local if count is None else count


def _routing(keys: Keys) -> Json:
    keys.neutral("router_jitter_noise", 0.0)
    return {
        "experts": _experts(keys),
        "experts_per_token": keys.get("num_experts_per_tok"),
        "router_loss_weight": keys.get("router_aux_loss_coef"),
    }


def _mixtral(keys: Keys) -> Json:
    return rotary(keys) | _routing(keys) | {"sliding_window": keys.get("sliding_window")}


def _mixtral_keys(c: DecoderConfig) -> Json:
    own = {"num_local_experts": c.experts, "num_experts_per_tok": c.experts_per_token}
    own |= {"router_aux_loss_coef": c.router_loss_weight, "sliding_window": c.sliding_window}
    return {"hidden_act": "silu"} | rotary_keys(c) | own


def _qwen(keys: Keys) -> Json:
    window = keys.get("sliding_window") if keys.get("use_sliding_window") else None
    own = {"qk_norm": True, "normalize_experts": keys.get("norm_topk_prob"), "sliding_window": window}
    return rotary(keys) | biases(keys) | own | _feed_forward(keys)


def _feed_forward(keys: Keys) -> Json:
    """Feed-forward width and routing. Layers are stacked, so all have experts, or none."""
    layers, step = keys.get("num_hidden_layers"), keys.get("decoder_sparse_step")
    dense, routing = keys.get("mlp_only_layers") or [], _routing(keys)
    sparse = [bool(routing["experts"]) and n not in dense and (n + 1) % step == 0 for n in range(layers)]
    width, dense_width = keys.get("moe_intermediate_size"), keys.get("intermediate_size")
    if not any(sparse):
        return {"feed_forward": dense_width}
    if not all(sparse):
        raise UserError(
            f"config.json: decoder_sparse_step={step} and mlp_only_layers={shown(dense)} give experts "
            f"to layers {shown([n for n in range(layers) if sparse[n]])} of {layers} only; expected all layers, or "
            "none, to have them."
        )
    return routing | {"feed_forward": width}


def _qwen_keys(c: DecoderConfig) -> Json:
    own = {"num_experts": c.experts, "num_experts_per_tok": c.experts_per_token, "decoder_sparse_step": 1}
    own |= {"moe_intermediate_size": c.feed_forward, "norm_topk_prob": c.normalize_experts, "mlp_only_layers": []}
    own |= {"router_aux_loss_coef": c.router_loss_weight, "attention_bias": c.qkv_bias}
    windows = {"use_sliding_window": c.sliding_window is not None, "sliding_window": c.sliding_window}
    return {"hidden_act": "silu"} | rotary_keys(c) | own | windows


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        sizes=SIZES,
        defaults=DEFAULTS
        | {"num_experts": None, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
        | {"sliding_window": None, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
        | {"max_position_embeddings": 131_072},
        options=_mixtral,
        keys=_mixtral_keys,
        expresses=lambda c: c.experts > 0 and c.normalize_experts and only(c, *_OPTIONS),
        row=_named(_MIXTRAL),
        ignored=IGNORED,
        prefix=PREFIX,
        copies=COPIES,
        harmless=frozenset({"output_router_logits"}),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        sizes=SIZES,
        defaults=DEFAULTS
        | {"num_experts": None, "num_local_experts": None, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.001}
        | {"decoder_sparse_step": 1, "mlp_only_layers": None, "moe_intermediate_size": 768, "norm_topk_prob": False}
        | {"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 4}
        | {"max_position_embeddings": 32_768},
        options=_qwen,
        keys=_qwen_keys,
        expresses=lambda c: (
            c.experts > 0
            and c.qk_norm
            and c.qkv_bias == c.output_bias
            and only(c, "qk_norm", "qkv_bias", "output_bias", *_OPTIONS)
        ),
        row=_named(_QWEN),
        ignored=IGNORED,
        prefix=PREFIX,
        copies=COPIES,
        harmless=frozenset({"output_router_logits"}),
    ),
}
