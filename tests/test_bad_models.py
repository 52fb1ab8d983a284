"""Bad inputs: each gives one clear message and exit code 2 before anything is computed.

``CASES`` run through ``scripts/distill.py`` here. ``HELD`` lists inputs that cannot, or that fail later, such as a full
disk, with the test of another file that covers them.
"""

import ast
import importlib.util
import json
import re
import resource
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
from text_builders import CHAT, byte_level, tiny_tokenizer, write_lines

import distill
from distill import cli
from distill.experiments.folder import write_config
from distill.experiments.sentences.config import SentenceConfig
from distill.models import DecoderConfig, EncoderConfig, decoder, encoder
from distill.tokenizer import TextTokenizer
from distill.weights.files import INDEX

TESTS = Path(__file__).parent
HELD = {
    "several files without an index": "folder.several_files_without_an_index_are_refused",
    "a tensor left over": "weights.tensors_that_do_not_fit_are_named",
    "offline and not in the cache": "folder.offline_a_name_is_read_from_the_cache_and_a_missing_one_is_reported",
    "a GGUF key the decoder lacks": "gguf.a_key_the_decoder_lacks_is_named",
    "a quantisation that cannot be undone": "gguf.a_quantisation_that_cannot_be_undone_is_named",
    "the package gguf is missing": "gguf.the_package_is_named_when_it_is_missing",
    "a file with another hash": "gguf.fetching_keeps_only_what_has_the_right_hash",
    "no network": "gguf.no_network_is_one_message",
    "a chat template that fails": "text_tokenizer.bad_tokenizers_are_refused",
    "tokens without a row of logits": "vocab.tokens_without_a_row_are_refused",
    "no split of that name": "text_data.splits_of_a_folder_are_chosen_by_name",
    "text with nothing to predict": "text_data.a_side_without_documents_is_refused",
    "the disk is full while saving": "save.a_full_disk_leaves_the_folder_as_it_was",
    "a target that cannot be written": "save.targets_that_cannot_be_written_are_errors",
    "killed while saving": "save.a_kill_while_writing_leaves_the_folder_as_it_was",
    "a model without a family": "families.a_decoder_without_a_family_is_refused",
    "parameters of another model": "weights.parameters_of_another_decoder_are_refused",
    "a student larger than its teacher": "text_experiment.impossible_experiments_are_refused_before_training",
    "a run folder of another configuration": "text_experiment.a_changed_run_is_refused",
}
"""Bad input → ``FILE.TEST`` of ``tests/test_FILE.py``, without ``test_``."""


def test_every_entry_of_held_names_a_test():
    places = [place.split(".") for place in HELD.values()]
    trees = {file: ast.parse((TESTS / f"test_{file}.py").read_text()) for file in {file for file, _ in places}}
    for file, name in places:
        found = [n for n in trees[file].body if isinstance(n, ast.FunctionDef) and n.name == f"test_{name}"]
        assert found and any(isinstance(n, ast.Name | ast.Attribute) for n in ast.walk(found[0])), (file, name)
    assert len(CASES) >= 30


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


def rewritten(change):
    """Changes a tensor of the last shard, ``change(name, array)`` as ``{name: array}``."""

    def spoil(folder):
        tensors = load_file(shards(folder)[-1])
        name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
        array = tensors.pop(name)
        save_file(tensors | change(name, array), shards(folder)[-1], metadata={"format": "pt"})

    return spoil


def halved(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def edited(place, change):
    """Changes a JSON file of the folder in place."""

    def spoil(folder):
        values = json.loads((folder / place).read_text())
        change(values)
        (folder / place).write_text(json.dumps(values))

    return spoil


def config_json(**values):
    return edited("teacher/config.json", lambda config: config.update(values))


def written(place, content):
    return lambda folder: (folder / place).write_bytes(content)


def records(*values):
    """JSON lines: the given records in turn, forty lines in all."""
    return lambda folder: write_lines(folder / "text.jsonl", values * (40 // len(values)))


def pickled(folder):
    for n, file in enumerate(shards(folder)):
        file.rename(file.with_name(f"pytorch_model-{n}.bin"))
    (folder / "teacher" / INDEX).unlink()


def too_many_tokens(folder):
    big = byte_level()
    big.add_tokens([f"<extra{n}>" for n in range(9)])
    TextTokenizer(big.to_str(), "</s>").save(folder / "teacher")
    byte_level.cache_clear()


def other_tokens(folder):
    shutil.copytree(folder / "teacher", folder / "student")
    edited("student/tokenizer.json", lambda values: values["model"]["vocab"].update(fox=318, dog=319))(folder)


def gguf_file(**options):
    return lambda folder: write_gguf(
        folder / "model.gguf", LLAMA, **({"architecture": "llama", "tensors": tensors_of(LLAMA)} | options)
    )


def gguf_not_a_number(folder):
    """Sets the scale of one block of a quantised tensor to NaN."""
    kind, tensors = gguf.GGMLQuantizationType.Q8_0, tensors_of(LLAMA)
    blocks = gguf.quants.quantize(tensors.pop("blk.1.ffn_up.weight"), kind)
    blocks[3, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    gguf_file(tensors=tensors, raw={"blk.1.ffn_up.weight": (blocks, kind)})(folder)


def gguf_cut_off(folder):
    gguf_file()(folder)
    halved(folder / "model.gguf")


def encoder_folder(folder):
    model = encoder(EncoderConfig(vocab_size=320, layers=1, width=8, heads=2, feed_forward=12, max_length=16))
    shutil.rmtree(folder / "teacher")
    distill.save(folder / "teacher", model, random_params(model), tiny_tokenizer())


def another_run(folder):
    (folder.parent / "run").mkdir()
    write_config(folder.parent / "run", SentenceConfig())


def nothing(folder):
    pass


GGUF, ONE_LAYER = ("--teacher", "{}/model.gguf"), ("--student.layers", "1")
CASES = {
    # model folder
    "no such folder": (nothing, r"nowhere/a/model: no such folder or file", "--teacher", "nowhere/a/model"),
    "no config.json": (lambda at: (at / "teacher/config.json").unlink(), r"teacher/config\.json: missing; expected a"),
    "broken config.json": (
        written("teacher/config.json", b"{"),
        r"teacher/config\.json: not readable as JSON .*Expecting",
    ),
    "a list as config.json": (written("teacher/config.json", b"[]"), r"teacher/config\.json: expected an object"),
    "unknown architecture": (
        config_json(model_type="mamba"),
        r"model_type='mamba' is not supported; expected one of llama, .*modernbert",
    ),
    "unknown key": (config_json(attention_multiplier=2), r"attention_multiplier=2 of model_type 'llama': not known"),
    "unknown rope": (
        config_json(rope_parameters={"rope_type": "spiral"}),
        r"rope_type='spiral' is not supported; expected one of default, linear, dynamic, llama3, yarn, longrope",
    ),
    "missing key": (
        edited("teacher/config.json", lambda config: config.pop("hidden_size")),
        r"config\.json: hidden_size is missing",
    ),
    "code of its own": (config_json(auto_map={"AutoModel": "a.B"}), r"auto_map names code .* never run"),
    "encoder as teacher": (encoder_folder, r"teacher: an encoder, .*expected a language model", *ONE_LAYER),
    # weights
    "missing shard": (
        lambda at: shards(at)[-1].unlink(),
        r"model-0000\d-of-0000\d\.safetensors: missing; .* names it. Was the download cut off",
    ),
    "shard cut off": (lambda at: halved(shards(at)[0]), r"not readable as safetensors: cut off or damaged"),
    "broken index": (written(f"teacher/{INDEX}", b"{"), r"index\.json: not readable as JSON"),
    "index that leads elsewhere": (
        edited(f"teacher/{INDEX}", lambda index: index["weight_map"].update(a="../b.safetensors")),
        r"index\.json: names \['\.\./b\.safetensors'\]; expected files beside it",
    ),
    "weights that unpickle": (pickled, r"only pytorch_model-0\.bin, .* which can run code when opened"),
    "NaN": (
        rewritten(lambda name, array: {name: np.full_like(array, np.nan)}),
        r"mlp\.up_proj\.weight holds nan at \[0, 0\]; expected finite numbers",
    ),
    "wrong shape": (
        rewritten(lambda name, array: {name: np.ascontiguousarray(array.T)}),
        r"mlp\.up_proj\.weight: shape \(8, 12\); expected \(12, 8\)",
    ),
    "quantised": (
        rewritten(lambda name, array: {name: array.astype(np.int8)}),
        r"mlp\.up_proj\.weight has type I8; expected floats",
    ),
    "tensor under another name": (
        rewritten(lambda name, array: {"other": array}),
        r"lacks model\.layers\.\d\.mlp\.up_proj\.weight, which .* places there",
    ),
    "a layer too few": (config_json(num_hidden_layers=3), r"missing: model\.layers\.2\.input_layernorm\.weight"),
    "a layer too many": (config_json(num_hidden_layers=1), r"not understood: model\.layers\.1\.input_layernorm\.w"),
    # tokenizer
    "no tokenizer.json": (
        lambda at: (at / "teacher/tokenizer.json").unlink(),
        r"tokenizer\.json: missing; expected a folder with a tokenizer\.json",
    ),
    "broken tokenizer": (
        written("teacher/tokenizer.json", b'{"model": 1}'),
        r"tokenizer\.json: no tokenizer that the library tokenizers reads",
    ),
    "no end-of-text token": (
        edited("teacher/tokenizer_config.json", lambda values: values.pop("eos_token")),
        r"no file names an end-of-text token",
    ),
    "more tokens than rows": (too_many_tokens, r"the tokenizer has ids up to 32\d, the embedding 320 rows"),
    "student with other tokens": (
        other_tokens,
        r"give 2 ids different meanings",
        *("--student.layers", "None", "--student.source", "{}/student"),
    ),
    # GGUF file
    "no GGUF file": (written("model.gguf", b"PK\3\4"), r"no GGUF file; it starts with b'PK", *GGUF),
    "GGUF cut off": (gguf_cut_off, r"model\.gguf: not readable as GGUF: cut off", *GGUF),
    "NaN in a block of GGUF": (gguf_not_a_number, r"tensor blk\.1\.ffn_up\.weight holds nan at \[3, 0\]", *GGUF),
    "unknown GGUF architecture": (gguf_file(architecture="mamba"), r"architecture 'mamba'; supported: llama", *GGUF),
    "one part of a GGUF model": (gguf_file(header={"split.count": 3}), r"one of 3 parts of a model; join them", *GGUF),
    # text
    "no such text": (nothing, r"nowhere\.jsonl: no such file or folder", "--data.source", "nowhere.jsonl"),
    "empty data set": (written("text.jsonl", b""), r"no documents on the side 'train'"),
    "a line of broken JSON": (
        lambda at: (at / "text.jsonl").write_text('{"text": "a"}\n' * 6 + '{"text": "no end\n'),
        r"text\.jsonl:7: not JSON",
    ),
    "record without text": (records({"said": "a fox"}), r"text\.jsonl:1: fields said; expected 'text', 'prompt'"),
    "text that is a number": (records({"text": 1}), r"text\.jsonl:1: field 'text' is a int; expected text"),
    "not UTF-8": (
        written("notes.txt", b"one\ntwo \xff"),
        r"notes\.txt:2: not UTF-8 \(byte 8 of the file\)",
        *("--data.source", "{}/notes.txt"),
    ),
    "broken parquet": (
        written("table.parquet", b"PAR1 and no more"),
        r"table\.parquet: not readable as parquet",
        *("--data.source", "{}/table.parquet"),
    ),
    "conversations without a template": (records({"messages": CHAT}), r"text\.jsonl:1: .*no chat template"),
    "documents shorter than a prompt": (
        records({"text": "fox"}, {"text": "dog"}),
        r"prompt_tokens=9: no held-out row begins",
        *(*ONE_LAYER, "--prompt-tokens", "9"),
    ),
    # configuration and overrides
    "more layers than there are": (nothing, r"9 layers of 2; expected 1 … 2", "--student.layers", "9"),
    "fewer tokens than bytes": (nothing, r"prune: size=9; bytes and special tokens alone", "--vocabulary", "9"),
    "unknown configuration": (nothing, r"--config smollm: unknown; did you mean", "--config", "smollm"),
    "run folder of another kind": (another_run, r"run: holds an experiment of kind 'sentences'; .*another --run"),
    "disk full": (lambda at: resource.setrlimit(resource.RLIMIT_FSIZE, (0, FILE_SIZE[1])), r"the disk is full .*File"),
}
"""Name of the fault → change of the good folder, expected message, further arguments."""
FILE_SIZE = resource.getrlimit(resource.RLIMIT_FSIZE)


@pytest.fixture(scope="module")
def main():
    before = sys.path[0]
    spec = importlib.util.spec_from_file_location("script_distill", TESTS.parent / "scripts" / "distill.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.path[0] = before
    return script.main


@pytest.fixture
def no_limit():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_exit_code_2(name, good, main, no_limit, tmp_path, monkeypatch, capsys):
    spoil, message, *more = CASES[name]
    shutil.copytree(good, tmp_path / "in")
    command = ["distill.py", "--config", "smollm2_text", "--run", str(tmp_path / "run")]
    command += ["--data.heldout-fraction", "0.3"]
    command += ["--data.source", str(tmp_path / "in" / "text.jsonl"), "--data-dir", str(tmp_path / "prepared")]
    command += ["--teacher", str(tmp_path / "in" / "teacher"), "--prompt-tokens", "2", "--data.length", "16"]
    monkeypatch.setattr(sys, "argv", command + [part.format(tmp_path / "in") for part in more])
    monkeypatch.setattr(cli, "set_up_jax", lambda **options: None)
    spoil(tmp_path / "in")
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(main)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "checkpoints").exists()  # reported before anything was computed
