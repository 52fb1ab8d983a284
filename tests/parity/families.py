"""Every family against transformers: logits, gradients, and folders that both open. Needs PyTorch: ``make parity``.

``python tests/parity/families.py`` writes what ``tests/test_families.py`` compares with, where it has changed.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import stored
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

DATA = Path(__file__).resolve().parents[1] / "data" / "families"
LENGTH = 16
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OTHERWISE = {
    "gpt_neox": ("num_key_value_heads", "head_dim", "rms_norm_eps"),
    "gpt2": tuple(key for key in SIZES if key != "vocab_size" and not key.endswith("_id")),
}
"""Sizes that a family lacks, or names differently."""
SHORT = {"rope_theta": 60.0, "original_max_position_embeddings": 12}  # so that 16 tokens are a long text


def scaled(kind, **keys):
    return {"rope_parameters": {"rope_type": kind, **SHORT, **keys}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
PARTIAL = {"rope_parameters": {"rope_theta": 60.0, "partial_rotary_factor": 0.5}}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 60.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [1.25, 3.0],
        "original_max_position_embeddings": 12,
    }
}
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16, "layer_norm_epsilon": 1e-3}
NEOX = {"hidden_size": 12, "num_attention_heads": 3, "layer_norm_eps": 1e-3, "intermediate_size": 10}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 60.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
}
CASES = {
    "llama": ("llama", {}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3": ("llama", scaled("llama3", **LLAMA3)),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 60.0, "factor": 2.5}}),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 60.0, "factor": 2.0}, "max_position_embeddings": 12},
    ),
    "llama_yarn": ("llama", scaled("yarn", factor=4.0, beta_fast=4.0, original_max_position_embeddings=40)),
    "smollm2": (
        "llama",
        {"hidden_size": 12, "head_dim": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": True},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "head_dim": 2, "hidden_size": 8}),
    "mistral": ("mistral", {"sliding_window": 5, "hidden_size": 14}),
    "mistral_no_window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"hidden_size": 16, "head_dim": 4}),
    "qwen2_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3}
        | {"hidden_size": 8, "head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 8, "hidden_size": 10, "tie_word_embeddings": True}),
    "qwen3_yarn": (
        "qwen3",
        {"attention_bias": True}
        | scaled("yarn", factor=3.0, beta_fast=3.0, beta_slow=0.5, truncate=False, mscale=0.7, mscale_all_dim=1.3),
    ),
    "gemma2": (
        "gemma2",
        {"num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0, "hidden_size": 8, "num_key_value_heads": 1, "head_dim": 4},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        | {"query_pre_attn_scalar": 5, "rope_parameters": GEMMA3, "hidden_size": 8, "tie_word_embeddings": False},
    ),
    "olmo2": ("olmo2", {"hidden_size": 10, "head_dim": 4}),
    "olmo2_biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 1}),
    "phi3": ("phi3", {"hidden_size": 10, "head_dim": 4, "sliding_window": 6, **PARTIAL}),
    "phi3_longrope": ("phi3", {"head_dim": 4, "hidden_size": 16, "original_max_position_embeddings": 12, **LONGROPE}),
    "gpt2": ("gpt2", {**GPT2, "n_inner": 14}),
    "gpt2_untied": ("gpt2", {**GPT2, "n_head": 2, "activation_function": "gelu", "tie_word_embeddings": False}),
    "pythia": (
        "gpt_neox",
        {**NEOX, "hidden_size": 16, "num_attention_heads": 2, "rope_parameters": {"rope_theta": 60.0}},
    ),
    "neox_in_turn": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 60.0, "partial_rotary_factor": 1.0}},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 7, "hidden_size": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 4, "intermediate_size": 4},
    ),
    "qwen3_moe_normalized": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "intermediate_size": 5}
        | {"norm_topk_prob": True, "attention_bias": True, "router_aux_loss_coef": 0.02},
    ),
}
"""Name → model_type and what differs from ``SIZES``."""
EXPERTS = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
"""model_type → in its files, the module of a layer with experts, and the matrices of an expert."""


def build(name: str, folder: Path) -> None:
    """Writes the folder of a case with transformers: with random parameters, none exactly 0 or 1."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key not in OTHERWISE.get(kind, ())}
    config = transformers.AutoConfig.for_model(kind, **(sizes | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            draw = rng.normal(size=parameter.shape) * (0.4 if parameter.ndim == 2 else 0.3)
            parameter.copy_(torch.tensor(draw + (parameter.ndim == 1 and 0.5), dtype=torch.float32))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def inputs() -> dict[str, dict[str, np.ndarray]]:
    """Two rows; one row padded on the left; one row of two documents."""
    rng = np.random.default_rng(1)
    rows, padded, packed = (rng.integers(0, SIZES["vocab_size"], (n, LENGTH)) for n in (2, 1, 1))
    counts, first = np.arange(LENGTH)[None], LENGTH // 3  # the same as in tests/test_families.py
    in_second = counts >= first
    return {
        "rows": {"tokens": rows},
        "padded": {
            "tokens": padded,
            "segments": (counts >= 3).astype(np.int32),
            "positions": np.maximum(counts - 3, 0),
        },
        "packed": {
            "tokens": packed,
            "segments": 1 + in_second.astype(np.int32),
            "positions": np.where(in_second, counts - first, counts),
        },
    }


def theirs(folder: Path) -> dict[str, np.ndarray]:
    """Logits of each input, and gradients of the mean cross-entropy of ``rows``, by transformers in float32."""
    results = {}
    for name, given in inputs().items():
        # Opened anew each time: dynamic scaling remembers the longest text.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        if model.config.model_type in EXPERTS:
            model.set_experts_implementation("eager")  # grouped products want rows of 16 bytes
        tokens = torch.tensor(given["tokens"])
        more = {"position_ids": torch.tensor(given["positions"])} if "positions" in given else {}
        if name == "padded":
            more["attention_mask"] = torch.tensor(given["segments"])
        if model.config.model_type in EXPERTS:
            more["output_router_logits"] = True
        output = model(tokens, use_cache=False, **more)
        logits = output.logits
        if model.config.model_type in EXPERTS:
            results[f"load_balancing/{name}"] = output.aux_loss.detach().numpy()
        results[f"logits/{name}"] = logits.detach().numpy()
        if name == "rows":
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            gradients = {key: value.grad.numpy() for key, value in model.named_parameters()}
            if model.config.model_type in EXPERTS:
                gradients = of_experts(gradients, *EXPERTS[model.config.model_type])
            renamed = {"lm_head.weight": "embed_out.weight"} if model.config.model_type == "gpt_neox" else {}
            results |= {f"gradient/{renamed.get(key, key)}": value for key, value in gradients.items()}  # as in files
    return results


def of_experts(tensors: dict[str, np.ndarray], module: str, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Tensors by their names in files, where each expert's matrices are separate tensors."""
    result = {}
    for key, value in tensors.items():
        layer, found, kind = key.partition(".mlp.experts.")
        if not found:
            result[key.replace(".mlp.", f".{module}.")] = value
            continue
        for expert, matrix in enumerate(value):
            parts = {"down": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate", "up"), np.split(matrix, 2), strict=True))
            for part, array in parts.items():
                result[f"{layer}.{module}.experts.{expert}.{names[part]}.weight"] = array
    return result


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return folder


def test_logits_and_gradients_are_those_of_transformers(folder):
    from test_families import compare

    print("\n", folder.name, compare(folder, theirs(folder)))


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 4_000])
def test_transformers_opens_what_is_saved(folder, tmp_path, shard_bytes):
    import distill

    model, params = distill.load(folder)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    distill.save(tmp_path, model, params, family=family, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_bytes < 5_000)
    before, after = theirs(folder), theirs(tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6, atol=1e-6)


def test_what_is_stored_is_what_transformers_says_now():
    assert sorted(path.name for path in DATA.iterdir()) == sorted(CASES)
    assert [name for name in CASES if not stored.agrees(DATA / name, theirs(DATA / name))] == []


if __name__ == "__main__":
    stored.write(DATA, CASES, build, theirs)
    sys.exit(0)
