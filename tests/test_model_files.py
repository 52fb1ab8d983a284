"""Files of a model folder: each that can change the model is read, known to agree, or an error; and their names."""

import json
import os
import resource
import stat
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import random_params, tiny, tiny_decoder
from safetensors.numpy import load_file, save_file

import distill
from distill.errors import MissingFile, UserError
from distill.models import EncoderConfig, decoder, encoder
from distill.weights import read_config
from distill.weights.families import FAMILIES
from distill.weights.files import INDEX, SINGLE

DATA = Path(__file__).resolve().parent / "data"
HEADS = {
    "llama_biases": ("lm_head.weight", "model.embed_tokens.weight"),
    "qwen3": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "pythia": ("embed_out.weight", "gpt_neox.embed_in.weight"),
}
"""Folder → names of its head and of its embedding."""


@pytest.fixture
def saved(tmp_path):
    """``(folder, params)`` of a tied decoder."""
    model = tiny_decoder(tied=True)
    params = random_params(model)
    distill.save(tmp_path / "model", model, params)
    return tmp_path / "model", params


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE, metadata={"format": "pt"})


# ---- files


def test_files_that_change_no_logit_are_left_alone(saved):
    folder, params = saved
    for name in ("README.md", "LICENSE", ".gitattributes", "model.png", "preprocessor_config.json", "eval.json"):
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.Q8_0.gguf", "tf_model.h5", "modeling_own.py"):
        (folder / name).write_bytes(b"x")
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"x")
    (folder / "original").mkdir()
    (folder / "original/other.safetensors").write_bytes(b"x")
    same(distill.load(folder)[1], params)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{}", r"adapter_config\.json: an adapter beside a model.*merge_and_unload"),
        ("adapter_model.safetensors", "", r"adapter_model\.safetensors: an adapter beside a model"),
        ("adapter_model.bin", "", r"adapter_model\.bin: an adapter beside a model"),
        ("quantize_config.json", "{}", r"quantize_config\.json: the weights are quantised"),
        ("hf_quant_config.json", "{}", r"hf_quant_config\.json: the weights are quantised"),
        ("value_head.safetensors", "", r"value_head\.safetensors beside model\.safetensors; expected one model"),
        (INDEX, '{"weight_map": {"a": "other.safetensors"}}', r"model\.safetensors beside other\.safetensors"),
        (INDEX, "[]", r"index\.json: expected an object; got \[\]"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense"}]', r"modules\.json: module 'sen.*Dense'"),
        ("modules.json", "{}", r"modules\.json: module None"),
    ],
)
def test_a_file_that_changes_the_model_is_named(saved, name, content, message):
    folder, _ = saved
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        distill.load(folder)


def test_the_modules_of_sentence_embeddings_are_known(saved):
    folder, params = saved
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"idx": n, "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    same(distill.load(folder)[1], params)


def test_shards_of_an_earlier_save_beside_the_index_are_named(saved):
    folder, params = saved
    distill.save(folder, decoder(tiny(tied=True)), params, shard_bytes=1500)
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model-00009-of-00009\.safetensors beside model-00001"):
        distill.load(folder)


def test_an_adapter_alone_says_how_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    for read in (distill.load, read_config):
        with pytest.raises(UserError, match=r"an adapter \(peft_type 'LORA'\) of 'org/base'.*merge_and_unload"):
            read(tmp_path)


def test_a_folder_with_a_gguf_file_alone_names_its_path(tmp_path, saved):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/a.gguf").write_bytes(b"x")
    with pytest.raises(MissingFile, match=r"config\.json: missing; give the path of a\.gguf"):
        distill.load(tmp_path / "gguf")
    folder, _ = saved
    (folder / SINGLE).rename(folder / "a.gguf")
    with pytest.raises(UserError, match=r"no safetensors file; to read a\.gguf, give its path"):
        distill.load(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX])
@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder"])
def test_what_is_no_regular_file_is_refused_in_a_moment(saved, name, kind):
    folder, _ = saved
    (folder / name).unlink(missing_ok=True)
    at = folder / name
    {
        "fifo": lambda: os.mkfifo(at),
        "device": lambda: at.symlink_to("/dev/zero"),
        "loop": lambda: at.symlink_to(at),
        "folder": at.mkdir,
    }[kind]()
    start = time.monotonic()
    if (name, kind) == (INDEX, "loop"):  # a link that leads nowhere is no file: the single file is read
        distill.load(folder)
    else:
        with pytest.raises(UserError):
            distill.load(folder)
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe{", b"1", b'"x"', b"null"])
def test_a_configuration_that_is_no_object_is_refused(saved, content):
    folder, _ = saved
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: (not readable as JSON in UTF-8|expected an object)"):
        distill.load(folder)


def test_a_configuration_of_gigabytes_is_not_opened(saved):
    folder, _ = saved
    with (folder / "config.json").open("ab") as file:
        file.truncate(2**36)  # a hole: it takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"config\.json: 68719476736 bytes; expected at most"):
        distill.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_more_experts_than_the_files_could_hold_are_refused_at_once(tmp_path):
    model = decoder(tiny(experts=3))
    distill.save(tmp_path, model, random_params(model))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_local_experts": 65_536}))
    start = time.monotonic()
    with pytest.raises(UserError, match="the model has 393233 tensors, the files 35"):
        distill.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 16_000}))
    with pytest.raises(UserError, match="16000 layers, but .* holds 35 tensors"):
        distill.load(tmp_path)
    assert time.monotonic() - start < 5.0


# ---- permissions


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask):
    model = tiny_decoder()
    before = os.umask(umask)
    try:
        for _ in range(2):  # new, and replaced
            distill.save(tmp_path / "model", model, random_params(model), shard_bytes=1500)
    finally:
        os.umask(before)
    for path in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


# ---- names


def one_of_each_family():
    folders = sorted([*(DATA / "families").iterdir(), *(DATA / "encoders").glob("*mlm")])
    return {json.loads((folder / "config.json").read_text())["model_type"]: folder for folder in folders}


@pytest.mark.parametrize("kind", one_of_each_family())
def test_names_without_the_prefix_of_the_family_are_read(kind, tmp_path):
    family, folder = FAMILIES[kind], one_of_each_family()[kind]
    tensors = load_file(folder / SINGLE)
    bare = {name.removeprefix(family.prefix): array for name, array in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    same(distill.load(tmp_path)[1], distill.load(folder)[1])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_forward_module.", "module._orig_mod."])
def test_names_of_wrapped_modules_are_read(saved, prefix):
    folder, params = saved
    rewrite(folder, lambda tensors: {prefix + name: array for name, array in tensors.items()})
    same(distill.load(folder)[1], params)
    rewrite(
        folder,
        lambda tensors: {n.removeprefix(prefix).replace("layers.", "layers._orig_mod."): a for n, a in tensors.items()},
    )
    same(distill.load(folder)[1], params)


def test_the_head_of_neox_is_read_under_its_name_in_memory_too(tmp_path):
    """transformers 5 calls it lm_head in a model and embed_out in a file."""
    folder = DATA / "families/pythia"
    tensors = load_file(folder / SINGLE)
    save_file({n.replace("embed_out", "lm_head"): array for n, array in tensors.items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    same(distill.load(tmp_path)[1], distill.load(folder)[1])


def test_a_tensor_under_two_names_is_refused(saved):
    folder, _ = saved
    rewrite(folder, lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(UserError, match=r"norm\.weight and model\.norm\.weight|model\.norm\.weight and norm\.weight"):
        distill.load(folder)


def test_names_that_are_missing_are_shown_with_the_prefix(saved):
    folder, _ = saved
    rewrite(folder, lambda tensors: {n.removeprefix("model."): a for n, a in tensors.items() if "norm" not in n})
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.input_layernorm\.weight"):
        distill.load(folder)


# ---- tied heads


def tied(folder, tmp_path, change):
    """A copy of a folder whose ``config.json`` ties the head, with changed tensors."""
    values = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(change(load_file(folder / SINGLE)), tmp_path / SINGLE)
    return tmp_path


@pytest.mark.parametrize("name", HEADS)
def test_a_stored_head_that_differs_from_the_embedding_is_the_head(name, tmp_path):
    head, embedding = HEADS[name]
    other = {}

    def change(tensors):
        other["head"] = np.random.default_rng(0).normal(size=tensors[embedding].shape).astype(np.float32)
        return tensors | {head: other["head"]}

    model, params = distill.load(tied(DATA / "families" / name, tmp_path, change))
    assert not model.config.tied
    np.testing.assert_array_equal(params["head"], other["head"].T)
    distill.save(tmp_path / "again", model, params)
    same(distill.load(tmp_path / "again")[1], params)
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_stored_head_that_equals_the_embedding_stays_tied(name, dtype, tmp_path):
    head, embedding = HEADS[name]

    def change(tensors):
        short = tensors[embedding].astype(np.float16)  # the same numbers in both types
        return tensors | {embedding: short.astype(np.float32), head: short.astype(dtype)}

    model, params = distill.load(tied(DATA / "families" / name, tmp_path, change))
    assert model.config.tied and "head" not in params


@pytest.mark.parametrize("name", HEADS)
def test_a_tied_model_that_stores_its_head_alone_is_read(name, tmp_path):
    head, embedding = HEADS[name]
    want = {}

    def change(tensors):
        want["embedding"] = tensors.pop(embedding)
        return {n: a for n, a in tensors.items() if n != head} | {head: want["embedding"]}

    model, params = distill.load(tied(DATA / "families" / name, tmp_path, change))
    assert model.config.tied
    np.testing.assert_array_equal(params["embedding"], want["embedding"])


@pytest.mark.parametrize(
    ("name", "copy", "original"),
    [
        ("bert_mlm", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert_mlm", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("distilbert_mlm", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        ("modernbert_mlm", "decoder.weight", "model.embeddings.tok_embeddings.weight"),
    ],
)
def test_the_head_of_an_encoder_is_its_embedding_or_the_file_is_refused(name, copy, original, tmp_path):
    folder = DATA / "encoders" / name
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / SINGLE)
    params = distill.load(folder)[1]
    for changed in (tensors | {copy: tensors[original].copy()}, {n: a for n, a in tensors.items() if n != original}):
        save_file(changed | {copy: tensors[original].copy()}, tmp_path / SINGLE)
        same(distill.load(tmp_path)[1], params)
    save_file(tensors | {copy: tensors[original] + 1.0}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=f"{copy} differs from {original}; expected the same"):
        distill.load(tmp_path)


def test_an_encoder_without_a_head_ignores_that_of_its_file(tmp_path):
    model = encoder(EncoderConfig(vocab_size=11, layers=1, width=8, heads=2, feed_forward=12, token_types=2))
    params = random_params(model)
    distill.save(tmp_path, model, params)
    rewrite(tmp_path, lambda tensors: tensors | {"cls.predictions.decoder.weight": np.ones((11, 8), np.float32)})
    same(distill.load(tmp_path)[1], params)
