"""Bad inputs: each is one clear message before anything is computed, exit code 2 from a script, and nothing is lost.

What is listed in ``HELD`` is held by the test named beside it; what stands in ``CASES`` goes through
``scripts/distill.py`` here.
"""

import ast
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from builders import random_params
from safetensors.numpy import load_file, save_file
from test_gguf import LLAMA, tensors_of
from test_gguf import write as write_gguf
from text_builders import byte_level, tiny_tokenizer, write_lines

import distill
from distill import cli
from distill.models import DecoderConfig, decoder
from distill.tokenizer import TextTokenizer

TESTS = Path(__file__).parent
HELD = {
    "no such folder": "folder.what_is_no_model_is_refused",
    "a folder without config.json": "folder.what_is_no_model_is_refused",
    "config.json holds no object": "save.code_that_comes_with_weights_is_not_run",
    "config.json asks for code": "save.code_that_comes_with_weights_is_not_run",
    "an unknown key in config.json": "families.what_is_not_supported_is_named",
    "a rope_type nobody knows": "families.what_is_not_supported_is_named",
    "a key missing in config.json": "encoder_families.a_size_that_is_missing_is_named",
    "weights that unpickle": "folder.files_that_unpickle_are_not_opened",
    "a damaged index": "folder.damaged_indices_are_named",
    "an index that names files elsewhere": "folder.damaged_indices_are_named",
    "several files without an index": "folder.several_files_without_an_index_are_refused",
    "quantised tensors in safetensors": "folder.quantised_tensors_are_refused",
    "tensors of another model": "folder.tensors_of_another_model_are_refused",
    "a tensor left over": "weights.tensors_that_do_not_fit_are_named",
    "offline and not in the cache": "folder.offline_a_name_is_read_from_the_cache",
    "no GGUF file": "gguf.no_gguf_file",
    "one part of a GGUF model": "gguf.one_of_several_parts_is_refused",
    "a GGUF architecture that is not read": "gguf.another_architecture_is_named",
    "a GGUF key the decoder lacks": "gguf.what_the_decoder_lacks_is_named",
    "a quantisation that cannot be undone": "gguf.a_quantisation_that_cannot_be_undone_is_named",
    "the package gguf is missing": "gguf.the_package_is_named_when_it_is_missing",
    "a file with another hash": "gguf.fetching_keeps_only_what_has_the_right_hash",
    "no network": "gguf.no_network_is_one_message",
    "no tokenizer.json": "text_tokenizer.bad_tokenizers_are_refused",
    "a tokenizer without an end-of-text token": "text_tokenizer.bad_tokenizers_are_refused",
    "a chat template that fails": "text_tokenizer.bad_tokenizers_are_refused",
    "words without a row of logits": "vocab.tokens_without_a_row_are_refused",
    "no such text": "text_data.bad_files_are_refused",
    "text that is not UTF-8, with its line": "text_data.bad_files_are_refused",
    "a damaged parquet file": "text_data.bad_files_are_refused",
    "a record without text": "text_data.bad_record_is_named",
    "no split of that name": "text_data.splits_of_a_folder",
    "text with nothing to predict": "text_data.a_side_without_documents_is_refused",
    "the disk is full while saving": "save.a_full_disk_leaves_the_folder_as_it_was",
    "a target that cannot be written": "save.targets_that_cannot_be_written",
    "killed while saving": "save.a_kill_while_writing_leaves_the_folder_as_it_was",
    "a model no family can hold": "families.a_decoder_no_family_has_is_refused",
    "parameters of another model": "weights.parameters_of_another_decoder_are_refused",
    "a student larger than its teacher": "text_experiment.what_cannot_be_is_refused_before_training",
    "a run folder of another configuration": "text_experiment.a_changed_run_is_refused",
}
"""Bad input → ``FILE.TEST`` of ``tests/test_FILE.py``, without ``test_``."""


def test_what_is_listed_is_tested():
    for place in set(HELD.values()):
        file, _, name = place.partition(".")
        tree = ast.parse((TESTS / f"test_{file}.py").read_text())
        found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == f"test_{name}"]
        assert found and any(isinstance(n, ast.Name | ast.Attribute) for n in ast.walk(found[0])), place
    assert len(HELD) + len(CASES) >= 30


# ---- through the script


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """``teacher``, a folder of two shards with a tokenizer, and ``text.jsonl``."""
    here = tmp_path_factory.mktemp("good")
    model = decoder(DecoderConfig(vocab_size=320, layers=2, width=8, heads=2, feed_forward=12, tied=True))
    distill.save(here / "teacher", model, random_params(model), tiny_tokenizer(), shard_bytes=9_000)
    write_lines(here / "text.jsonl", [{"text": f"the quick brown fox number {n}"} for n in range(40)])
    return here


def shards(folder):
    return sorted((folder / "teacher").glob("*.safetensors"))


def changed(file, change):
    """A shard with one tensor changed."""
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})


def config_json(folder, **values):
    file = folder / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def missing_shard(folder):
    shards(folder)[-1].unlink()


def cut_off(folder):
    content = shards(folder)[0].read_bytes()
    shards(folder)[0].write_bytes(content[: len(content) // 2])


def not_a_number(folder):
    changed(shards(folder)[-1], lambda array: np.full_like(array, np.nan))


def wrong_shape(folder):
    changed(shards(folder)[-1], lambda array: np.ascontiguousarray(array.T))


def unknown_architecture(folder):
    config_json(folder, model_type="mamba")


def broken_config(folder):
    (folder / "teacher" / "config.json").write_text("{")


def broken_tokenizer(folder):
    (folder / "teacher" / "tokenizer.json").write_text('{"model": 1}')


def too_many_tokens(folder):
    big = byte_level()
    big.add_tokens([f"<extra{n}>" for n in range(9)])
    TextTokenizer(big.to_str(), "</s>").save(folder / "teacher")
    byte_level.cache_clear()


def other_tokens(folder):
    shutil.copytree(folder / "teacher", folder / "student")
    file = folder / "student" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["fox"], vocabulary["dog"] = 318, 319
    file.write_text(json.dumps(values))


def gguf_cut_off(folder):
    write_gguf(folder / "model.gguf", LLAMA, "llama", tensors_of(LLAMA))
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(content[: len(content) // 2])


def gguf_not_a_number(folder):
    """Of a quantised tensor: the scale of one block."""
    kind, tensors = gguf.GGMLQuantizationType.Q8_0, tensors_of(LLAMA)
    blocks = gguf.quants.quantize(tensors.pop("blk.1.ffn_up.weight"), kind)
    blocks[3, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    write_gguf(folder / "model.gguf", LLAMA, "llama", tensors, raw={"blk.1.ffn_up.weight": (blocks, kind)})


def no_text(folder):
    (folder / "text.jsonl").write_text("")


def broken_line(folder):
    lines = (folder / "text.jsonl").read_text().splitlines()
    (folder / "text.jsonl").write_text("\n".join([*lines[:6], '{"text": "no end', *lines[6:]]) + "\n")


def nothing_wrong(folder):
    pass


GGUF = ("--teacher", "{}/model.gguf")
OWN = ("--student.layers", "None", "--student.source", "{}/student")
CASES = {
    missing_shard: (r"model-0000\d-of-0000\d\.safetensors: missing; .* names it. Was the download cut off", ()),
    cut_off: (r"not readable as safetensors: cut off or damaged", ()),
    not_a_number: (r"mlp\.up_proj\.weight holds nan at \[0, 0\]; expected finite numbers", ()),
    wrong_shape: (r"mlp\.up_proj\.weight: shape \(8, 12\); expected \(12, 8\)", ()),
    unknown_architecture: (r"model_type='mamba' is not supported; expected one of llama, .*modernbert", ()),
    broken_config: (r"teacher: Expecting property name", ()),
    broken_tokenizer: (r"tokenizer\.json: no tokenizer that the library tokenizers reads", ()),
    too_many_tokens: (r"the tokenizer has ids up to 32\d, the embedding 320 rows", ()),
    other_tokens: (r"give 2 ids different meanings", OWN),
    gguf_cut_off: (r"model\.gguf: not readable as GGUF: cut off", GGUF),
    gguf_not_a_number: (r"tensor blk\.1\.ffn_up\.weight holds nan at \[3, 0\]", GGUF),
    no_text: (r"no documents on the side 'train'", ()),
    broken_line: (r"text\.jsonl:7: not JSON", ()),
    nothing_wrong: (r"9 layers of 2; expected 1 … 2", ("--student.layers", "9")),
}
"""What is done to the good folder → the message, and more of the command line."""


@pytest.fixture(scope="module")
def main():
    before = sys.path[0]
    spec = importlib.util.spec_from_file_location("script_distill", TESTS.parent / "scripts" / "distill.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.path[0] = before
    return script.main


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_the_script_says_what_is_wrong_and_exits_with_2(spoil, good, main, tmp_path, monkeypatch, capsys):
    shutil.copytree(good, tmp_path / "in")
    spoil(tmp_path / "in")
    message, more = CASES[spoil]
    command = [
        "distill.py",
        "--config",
        "smollm2_text",
        "--run",
        str(tmp_path / "run"),
        "--data.heldout-fraction",
        "0.3",
    ]
    command += ["--data.source", str(tmp_path / "in" / "text.jsonl"), "--data-dir", str(tmp_path / "prepared")]
    command += ["--teacher", str(tmp_path / "in" / "teacher"), "--prompt-tokens", "2", "--data.length", "16"]
    monkeypatch.setattr(sys, "argv", command + [part.format(tmp_path / "in") for part in more])
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(main)
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said.startswith("error: ") and "Traceback" not in said
    assert len(said.splitlines()) == 1
    assert re.search(message, said), said
