"""Model folders: bit-identical round trips, and everything that must be refused."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import nnx_model, random_params, tiny, tiny_decoder
from safetensors.numpy import load_file, save_file

import distill
from distill.models import decoder
from distill.parallel import ParallelConfig, make_mesh, param_shardings
from distill.weights import folder as folders
from distill.weights.files import INDEX, SINGLE
from distill.weights.safetensors import SafetensorsSource


@pytest.fixture
def saved(tmp_path):
    """``(folder, model, params)``."""
    model = tiny_decoder(qk_norm=True, head_dim=6)
    params = random_params(model)
    distill.save(tmp_path / "model", model, params)
    return tmp_path / "model", model, params


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 1500, 1], ids=["one file", "shards", "a tensor each"])
def test_loaded_parameters_are_bit_identical(tmp_path, dtype, shard_bytes):
    model = tiny_decoder(qkv_bias=True, tied=True)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(model))
    distill.save(tmp_path, model, params, shard_bytes=shard_bytes)
    again, loaded = distill.load(tmp_path, dtype=None)
    same(loaded, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert (again.config.groups, again.config.tied, again.config.qkv_bias) == (2, True, True)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    tensors = 2 + 12 * 2
    count = {10**9: 1, 1: tensors}.get(shard_bytes, len(files))
    assert len(files) == count and (count == 1) == (files == [SINGLE]) == (not (tmp_path / INDEX).exists())
    sizes = [sum(array.nbytes for array in load_file(tmp_path / name).values()) for name in files]
    assert shard_bytes == 1 or max(sizes) <= shard_bytes
    if count > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert len(index["weight_map"]) == tensors and index["metadata"]["total_size"] == sum(sizes)


def test_parameters_are_cast_and_activations_chosen(saved):
    folder, _, params = saved
    model, cast = distill.load(folder, dtype="bfloat16", activations="bfloat16")
    same(cast, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    assert model.config.dtype == "bfloat16"
    hidden = jax.eval_shape(model.apply, cast, jnp.zeros((1, 3), jnp.int32)).hidden
    assert hidden.dtype == jnp.bfloat16
    assert distill.load(folder)[0].config.dtype == "float32"


def test_each_parameter_is_loaded_onto_its_shards(tmp_path):
    model = decoder(tiny(vocab_size=12))
    params = random_params(model)
    distill.save(tmp_path, model, params)
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    _, sharded = distill.load(tmp_path, sharding=lambda model: param_shardings(model, mesh))
    same(sharded, params)
    wanted = param_shardings(model, mesh)
    jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding or pytest.fail(str(leaf.sharding)), sharded, wanted)
    assert not sharded["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated


def test_loading_reports_every_element_to_its_bar(saved, monkeypatch):
    folder, model, _ = saved
    reported = []

    @contextlib.contextmanager
    def loading(label, total):
        reported.append((label, total))
        yield reported.append

    monkeypatch.setattr(folders, "loading", loading)
    distill.load(folder)
    (label, total), *steps = reported
    assert (label, total) == ("model", model.parameter_count()) and sum(steps) == total and len(steps) > 10


def test_saving_again_replaces_the_whole_earlier_save(saved):
    folder, model, params = saved
    distill.save(folder, model, params, shard_bytes=1500)
    assert not (folder / SINGLE).exists()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    distill.save(folder, model, doubled)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SINGLE]
    same(distill.load(folder)[1], doubled)


def test_a_stored_copy_of_a_tied_head_is_ignored(tmp_path):
    model = tiny_decoder(tied=True)
    params = random_params(model)
    distill.save(tmp_path, model, params)
    tensors = load_file(tmp_path / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / SINGLE)
    same(distill.load(tmp_path)[1], params)


# ---- tokenizers


def test_tokenizers_are_saved_with_the_model(saved, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder, model, params = saved
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    distill.save(folder, model, params, tokenizer)
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] == {"a": 0, "b": 1, "?": 2}
    (folder / "merges.txt").write_text("a b\n")
    distill.save(tmp_path / "copy", model, params, folder)
    assert (tmp_path / "copy/tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert (tmp_path / "copy/merges.txt").read_text() == "a b\n"
    distill.save(folder, model, params, folder)  # onto itself
    assert (folder / "merges.txt").read_text() == "a b\n"


def test_a_tokenizer_of_transformers_saves_itself(saved):
    folder, model, params = saved
    asked = []

    class Its:
        eos_token_id = 7

        def save_pretrained(self, folder):
            asked.append(folder)

    def special():
        values = json.loads((folder / "config.json").read_text())
        return [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")]

    assert special() == [None, None, None]  # written explicitly, or transformers would use those of the original model
    distill.save(folder, model, params, Its())
    assert asked == [folder.parent / ".model.partial"] and special() == [None, 7, None]
    (folder / "tokenizer.json").write_text("{}")
    distill.save(folder, model, params, folder)
    assert special() == [None, 7, None]


@pytest.mark.parametrize("tokenizer", [3, "nowhere"])
def test_an_object_that_is_not_a_tokenizer_is_refused(saved, tokenizer):
    folder, model, params = saved
    with pytest.raises(ValueError, match="tokenizer"):
        distill.save(folder, model, params, tokenizer)


# ---- refused


def test_files_that_unpickle_are_not_opened(saved):
    folder, _, _ = saved
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, which can run code"):
        distill.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        distill.load(folder)


def test_damaged_files_are_named(saved):
    folder, _, _ = saved
    whole = (folder / SINGLE).read_bytes()
    for broken in (whole[:-7], b"", b"\xff" * 64, whole[:4]):
        (folder / SINGLE).write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors: not readable as safetensors"):
            distill.load(folder)


def test_damaged_indices_are_named(saved):
    folder, model, params = saved
    distill.save(folder, model, params, shard_bytes=1500)
    index = json.loads((folder / INDEX).read_text())
    first, name = index["weight_map"]["lm_head.weight"], "lm_head.weight"

    def load_with(text):
        (folder / INDEX).write_text(text)
        return distill.load(folder)

    for text in ("", "[]", "{}", '{"weight_map": {"a": ["b"]}}'):
        with pytest.raises(ValueError, match="index.json"):
            load_with(text)
    for outside in ("../model/" + first, str(folder / first), ".."):
        with pytest.raises(ValueError, match="expected files beside it"):
            load_with(json.dumps({"weight_map": index["weight_map"] | {name: outside}}))
    with pytest.raises(ValueError, match="lacks extra, which"):
        load_with(json.dumps({"weight_map": index["weight_map"] | {"extra": first}}))
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{first}: missing"):
        load_with(json.dumps(index))


def test_several_files_without_an_index_are_refused(saved):
    folder, _, _ = saved
    (folder / SINGLE).rename(folder / "one.safetensors")
    SafetensorsSource(folder)  # a single file is read whatever its name
    shutil.copy(folder / "one.safetensors", folder / "other.safetensors")
    with pytest.raises(ValueError, match="one.safetensors, other.safetensors without"):
        SafetensorsSource(folder)


def test_quantised_tensors_are_refused(saved):
    folder, _, _ = saved
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"model.norm.weight": np.ones(8, np.int8)}, folder / SINGLE)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has type I8; expected floats"):
        distill.load(folder)


def test_tensors_of_another_model_are_refused(saved):
    folder, _, _ = saved
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.input_layernorm\.weight, .* and 6 more"):
        distill.load(folder)
    file.write_text(json.dumps(values | {"intermediate_size": 13}))
    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight: shape"):
        distill.load(folder)


def test_a_folder_without_a_model_is_refused(tmp_path, saved):
    folder, _, _ = saved
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="model/config.json: not readable as JSON"):
        distill.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        distill.load(folder)
    for nowhere in (tmp_path / "nowhere", "./nowhere", "a/b/c", "nowhere.gguf"):
        with pytest.raises(FileNotFoundError, match="no such folder or file"):
            distill.load(nowhere)
    model = nnx_model()
    with pytest.raises(ValueError, match="expected one made by decoder"):
        distill.save(tmp_path / "nnx", model, model.init(jax.random.key(0)))


# ---- the hub


def hub_folder(cache, saved_folder, name="some/model"):
    """A cached snapshot in the layout of the hub's client."""
    root = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    shutil.copytree(saved_folder, root / "snapshots" / commit)


def test_offline_a_name_is_read_from_the_cache_and_a_missing_one_is_reported(saved, tmp_path):
    folder, _, params = saved
    hub_folder(tmp_path / "hub", folder)
    code = (
        "import distill; _, params = distill.load('some/model'); "
        "print(float(params['embedding'].sum()), 'torch' in sys.modules); distill.load('other/model')"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "HOME": str(tmp_path), "PATH": ""}
    environment["PYTHONPATH"] = str(Path(distill.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; {code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "MissingFile: other/model: no such folder, and not in the hub's cache" in done.stderr, done.stderr
    assert done.returncode
    total, torch = done.stdout.split()
    assert float(total) == pytest.approx(float(params["embedding"].sum()), rel=1e-6) and torch == "False"


def test_only_files_that_are_read_are_downloaded(saved, monkeypatch):
    import fnmatch

    import huggingface_hub

    folder, _, params = saved
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    same(distill.load("some/model", revision="abc")[1], params)
    assert (asked["name"], asked["revision"]) == ("some/model", "abc")

    def wanted(file):
        allowed, ignored = (
            any(fnmatch.fnmatch(file, pattern) for pattern in asked[key])
            for key in ("allow_patterns", "ignore_patterns")
        )
        return allowed and not ignored

    assert all(map(wanted, ["config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.model", "merges.txt"]))
    assert not any(map(wanted, ["pytorch_model.bin", "consolidated.safetensors", "original/a.safetensors", "m.py"]))


def test_the_package_is_imported_without_its_weights():
    code = "import sys, distill; assert not {'jax', 'distill.weights'} & set(sys.modules); distill.load; distill.save"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        distill.lode  # noqa: B018
