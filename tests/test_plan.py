"""The plan of a run: names of slices, the roofline against numbers by hand, the real step on 8 devices, collectives."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from distill.cli import explain
from distill.config import load_config
from distill.data.text import TextDataConfig
from distill.devices.chips import CHIPS, devices_of, parse_topology
from distill.experiments import preflight
from distill.experiments.text.config import StudentConfig, TextConfig
from distill.models import DecoderConfig
from distill.parallel import ParallelConfig, make_mesh
from distill.planning import plan, roofline
from distill.planning.hlo import Collective, collectives
from distill.students.config import StartConfig
from distill.train import lower
from distill.training import TrainingConfig

SHAPE = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return TextConfig(
        name="tiny",
        teacher=str(folder),
        data=TextDataConfig(source="data", length=32),
        student=StudentConfig(layers=2),
        training=TrainingConfig(
            steps=6, batch_size=16, micro_batches=2, steps_per_dispatch=3, evaluate_every=3, save_every=3
        ),
        teacher_dtype="bfloat16",
        prompt_tokens=8,
        parallel=ParallelConfig(backend="mesh", fsdp=4, tensor=1),
    )


@pytest.fixture(scope="module")
def values(config):
    return plan.plan(config, parse_topology("gpu:8"), dollars_per_hour=2.0)


# ---- names


@pytest.mark.parametrize(
    ("name", "chip", "devices", "tpu"),
    [
        ("v5e:4x4", "v5e", 16, True),
        ("v5p:2x2x4", "v5p", 16, True),
        ("v6e:8x8", "v6e", 64, True),
        ("gpu:8", "h100", 8, False),
        ("a100:16", "a100", 16, False),
    ],
)
def test_slices_have_names(name, chip, devices, tpu):
    topology = parse_topology(name)
    assert (topology.chip.name, topology.devices, topology.tpu) == (chip, devices, tpu)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "expected such as v5e:4x4"),
        ("v5e-16", "expected such as v5e:4x4"),
        ("v9:4x4", "no chip 'v9'"),
        ("v5e:16", "expected 2 sizes, such as v5e:4x4"),
        ("v5p:4x4", "expected 3 sizes, such as v5p:4x4x4"),
        ("gpu:2x4", "expected 1 sizes, such as h100:8"),
        ("gpu:0", "expected 1 sizes"),
    ],
)
def test_other_names_are_refused(name, said):
    with pytest.raises(ValueError, match=said):
        parse_topology(name)


def test_as_many_cpu_devices_stand_in_for_gpus_as_there_are():
    assert list(devices_of(parse_topology("gpu:4"))) == jax.devices()[:4]
    with pytest.raises(ValueError, match="with 8 CPU devices; set jax_num_cpu_devices to 16"):
        devices_of(parse_topology("h100:16"))


def test_without_the_compiler_for_tpus_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[tpu\]'"):
        devices_of(parse_topology("v5e:4x4"))


# ---- roofline

SMALL = DecoderConfig(vocab_size=100, layers=2, width=8, heads=2, kv_heads=1, feed_forward=16)
LARGE = DecoderConfig(vocab_size=100, layers=3, width=16, heads=4, kv_heads=4, feed_forward=32)


def test_flops_by_hand():
    """2 a multiply-add; a causal token of ten sees 5.5 keys on average, scores and values alike."""
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 2 * 4 * 5.5
    small = 2 * (2 * layer + 8 * 100)
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 4 * 4 * 5.5
    large = 2 * (3 * layer + 16 * 100)
    found = roofline.flops(roofline.Work(SMALL, LARGE, tokens=40, length=10, remat=False))
    assert found["student"] == 3 * 40 * small
    assert found["teacher"] == 40 * large
    assert found["model"] == found["hardware"] == found["student"] + found["teacher"]
    again = roofline.flops(roofline.Work(SMALL, LARGE, tokens=40, length=10, remat=True))
    assert again["hardware"] - again["model"] == 40 * (small - 2 * 8 * 100)  # all but the head
    assert again["model"] == found["model"]


def test_traffic_by_hand():
    """Bytes of one device: kernels in bfloat16 for every micro-batch, activations on both sides of every product."""
    work = roofline.Work(SMALL, LARGE, tokens=80, length=10, remat=False)
    split = roofline.Split(rows=4, tensor=2, student=8, micro_batches=2, chunk=5, fused=True)
    found = roofline.traffic(work, split, parameters=800)
    heads = (8 + 4 + 4 + 8) / 2  # q, k, v, o numbers of a token on one device
    units = 3 * 16 / 2
    kernels, across = 8 * (heads + units), 2 * heads + 4 * 8 + units
    assert found["student"] == 3 * 2 * (2 * kernels * 2 + 20 * 2 * across)
    assert found["optimizer"] == 100 * (28 + 12)
    chunks, words = 4, 50
    assert found["head"] == 20 * words * 30 + chunks * words * (4 * 8 + 2 * 16 + 8 * 8) + 2 * 20 * (3 * 8 + 16)
    plain = roofline.traffic(work, split._replace(fused=False), parameters=800)
    assert plain["student"] - found["student"] == 3 * 2 * 20 * (8 * 10 * 2 / 2)  # float32 scores, written and read


def test_the_slowest_part_bounds_a_step():
    chip = CHIPS["v5p"]
    found = roofline.times(chip, 64, hardware=64 * 459e12 * 0.25, moved=2765e9 * 0.5, sent=600e9 * 0.125)
    assert (found["compute"], found["memory"], found["interconnect"]) == (0.25, 0.5, 0.125)
    assert (found["step"], found["bound"]) == (0.5, "memory")
    assert roofline.price(tokens=500_000, seconds=0.5, devices=16, dollars_per_hour=3.6) == pytest.approx(16.0)


# ---- collectives

TEXT = """HloModule a
%scatter.1 (p: f32[8]) -> f32[2] {
  %a = f32[8]{0} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}
%all-reduce-scatter.2 (p: f32[8]) -> f32[2] {
  %b = f32[8]{0} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%stage (p: f32[8]) -> f32[2] {
  %c = f32[16]{0} all-gather(%p), channel_id=5, replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x','y'}
}
%layer (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = f32[2]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.2
  %h = f32[2]{0} fusion(%g), kind=kCustom, calls=%stage
  %i = f32[16]{0} all-gather(%p), channel_id=5, replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x','y'}
}
%layers (c: (s32[], f32[4])) -> pred[] {
  %n = u32[]{:T(128)} constant(28)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
%chunk (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[2]{0} fusion(%g), kind=kCustom, calls=%scatter.1
}
%chunks (c: (s32[], f32[4])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
%micro (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]) while(%t), condition=%layers, body=%layer
  %v = (s32[], f32[4]) while(%t), condition=%chunks, body=%chunk
  %s = f32[2]{0} reduce-scatter(%p), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}
}
%micros (c: (s32[], f32[4])) -> pred[] {
  ROOT %l = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%micros, body=%micro, backend_config={"known_trip_count":{"n":"4"}}
  %z = f32[4]{0} collective-permute(%p), channel_id=7, source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_count_as_often_as_their_loops_turn():
    kinds = sorted((one.kind, one.size, one.loops, one.devices) for one in collectives(TEXT))
    assert kinds == [
        ("all-gather", 64, (4, 28), 8),  # its stages share a channel: one
        ("all-reduce", 32, (4, None), 4),
        ("collective-permute", 16, (), None),
        ("reduce-scatter", 32, (4, 28), 4),  # a fused sum of which each keeps its part
        ("reduce-scatter", 64, (4,), 8),
    ]
    of_step = plan.by_kind(collectives(TEXT), chunks=10, steps=2)
    assert of_step["all-reduce"] == {"count": 20.0, "bytes": 20.0 * 32, "sent": 20 * 2 * 32 * 3 / 4}
    assert of_step["all-gather"] == {"count": 56.0, "bytes": 56.0 * 64, "sent": 56 * 64 * 7 / 8}
    assert of_step["reduce-scatter"]["sent"] == 56 * 32 * 3 / 4 + 2 * 64 * 7 / 8
    assert Collective("collective-permute", 16, (), None).sent == 16


def test_trip_counts_of_a_real_program():
    mesh = make_mesh(ParallelConfig(fsdp=8))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))
    def twice(x):
        def inner(x, _):
            return jax.lax.psum(x, "fsdp") * 0.5 + x, None

        return jax.lax.scan(lambda x, _: jax.lax.scan(inner, x, None, length=5), x, None, length=3)[0]

    (one,) = collectives(jax.jit(twice).lower(jnp.zeros((8, 16))).compile().as_text())
    assert (one.kind, one.size, one.devices, one.times()) == ("all-reduce", 64, 8, 15)


# ---- the plan


def test_the_plan_has_the_bytes_of_the_step_that_runs(config, values):
    task = plan.abstract_task(config)
    lowered, state, frozen = lower(task, config.training, config.parallel)
    memory = preflight.memory_plan(lowered, state, frozen)
    assert {name: values["bytes"][name] for name in ("arguments", "outputs", "shared")} == {
        name: memory[name] for name in ("arguments", "outputs", "shared")
    }
    kept = 8 // 8 * 32 * 16 * 4  # the teacher's states on the rows of the learning curve, a row on each device
    assert values["bytes"]["evaluation"] == kept and values["bytes"]["total"] == memory["total"] + kept
    assert values["bytes"]["temporary"] == memory["temporary"]
    assert [values["bytes"][name] for name in ("parameters", "optimizer", "teacher")] == [
        memory[name] for name in ("student", "optimizer", "teacher")
    ]
    # widths lie over fsdp = 4; norms (three of 16 in a layer pair, one at the end) and counters are everywhere
    whole = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "scale"
    )
    count = task.student.parameter_count()
    assert values["bytes"]["parameters"] == 4 * ((count - whole) / 4 + whole)
    placed = sum(values["bytes"][name] for name in ("parameters", "optimizer", "teacher", "data"))
    rows = 3 * 16 * 4 / 8  # indices
    assert 0 <= values["bytes"]["arguments"] - placed - rows < 4096
    assert values["bytes"]["optimizer"] == pytest.approx(2 * values["bytes"]["parameters"], rel=1e-3)


def test_the_program_is_as_long_for_four_layers_as_for_two(config):
    """Layers are scanned, forward and backward: a deep model is lowered and compiled as fast as a shallow one."""

    def length(layers):
        folder = Path(config.teacher) / str(layers)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 2 * layers}))
        deep = dataclasses.replace(config, teacher=str(folder), student=StudentConfig(layers=layers))
        lowered, *_ = lower(plan.abstract_task(deep), deep.training, deep.parallel, jax.devices())
        return len(lowered.as_text().splitlines())

    assert length(2) == length(4)


def test_the_plan_is_json_with_every_number_there(values):
    back = json.loads(json.dumps(values, allow_nan=False))
    assert set(back) == {
        "config", "topology", "devices", "chip", "mesh", "batch", "layers", "chunk", "compiled_for", "fits", "bytes",
        "flops", "collectives", "traffic", "seconds", "tokens_per_second", "mfu", "dollars_per_hour",
        "dollars_per_billion_tokens", "compile_seconds", "advice",
    }  # fmt: skip
    assert (back["compiled_for"], back["fits"], back["advice"]) == ("CPU", True, [])
    assert {axis: n for axis, n in back["mesh"].items() if n > 1} == {"data": 2, "fsdp": 4}
    step = back["seconds"]["step"]
    assert step == max(back["seconds"][part] for part in ("compute", "memory", "interconnect")) > 0
    assert back["tokens_per_second"] == pytest.approx(16 * 32 / step)
    assert back["dollars_per_billion_tokens"] == pytest.approx(8 * 2.0 / 3600 * step / (16 * 32) * 1e9)
    assert 0 < back["mfu"] <= 1


def test_gathers_turn_with_layers_and_micro_batches(values):
    """Seven kernels in each of 3 + 2 layers, the student's twice, in both micro-batches: at least so many."""
    assert values["collectives"]["all-gather"]["count"] >= 2 * (3 * 7 + 2 * 7)


def test_people_read_the_same_numbers(values, capsys):
    plan.print_plan(values)
    shown = capsys.readouterr().out
    assert "tiny on gpu:8: 8 h100 (data 2, fsdp 4)" in shown
    assert "ESTIMATED" in shown and "<- bound" in shown and f"{values['tokens_per_second']:,.0f}" in shown


def test_what_does_not_fit_is_told_what_to_change(config, monkeypatch, capsys):
    topology = parse_topology("gpu:8")
    small = topology._replace(chip=topology.chip._replace(memory=1e3))
    part = {
        "parameters": 100,
        "optimizer": 200,
        "teacher": 300,
        "data": 5,
        "evaluation": 0,
        "temporary": 10_000,
        "total": 10_605,
    }
    totals = iter([10_605, 5_000, 900])
    monkeypatch.setattr(
        plan, "compile_step", lambda config, *_: _program(part | {"total": next(totals)}, seen.append(config))
    )
    seen = []
    wide = changed(config, training={"batch_size": 32, "remat": "full"})
    values = plan.plan(wide, small, tries=3)
    assert not values["fits"] and values["seconds"] is None
    assert [one["change"] for one in values["advice"]] == ["--training.micro-batches 4", "--parallel.fsdp 8"]
    assert [(one["total"], one["fits"]) for one in values["advice"]] == [(5_000, False), (900, True)]
    assert seen[2].training.micro_batches == 4 and seen[2].parallel.fsdp == 8  # one on top of the other
    assert values["advice"][1]["saves"] == (100 + 200 + 300 + 100) // 2
    plan.print_plan(values)
    shown = capsys.readouterr().out
    assert "does NOT fit" in shown and "--parallel.fsdp 8" in shown


def _program(there, _):
    return plan.Program(there, [], 0.0, {"lower": 1.0, "compile": 2.0, "cpu": 3.0}, there["total"] <= 1e3)


def test_the_compilers_word_that_memory_is_too_small():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.7G")
    assert plan._needed(error, 2**30) == {"temporary": int(19.5 * 2**30), "total": int(20.5 * 2**30)}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan._needed(jax.errors.JaxRuntimeError("INTERNAL: other"), 0)


# ---- mistakes


def changed(config, **parts):
    inner = {name: dataclasses.replace(getattr(config, name), **values) for name, values in parts.items()}
    return dataclasses.replace(config, **inner)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"parallel": {"fsdp": 3}}, "does not divide the 8 devices"),
        ({"parallel": {"fsdp": 1, "tensor": 8}}, "kv=4 cannot be divided over tensor=8"),
        ({"training": {"micro_batches": 8}}, "gives 2 examples at a time, which cannot be divided over 8 devices"),
        ({"parallel": {"backend": "pmap", "fsdp": 1}}, "expected mesh"),
    ],
)
def test_what_cannot_be_divided_is_said_before_anything_is_compiled(config, parts, said):
    with pytest.raises(ValueError, match=said) as error:
        plan.plan(changed(config, **parts), parse_topology("gpu:8"))
    assert explain(error.value)[0] == 2


def test_other_mistakes(config):
    with pytest.raises(ValueError, match="kind addition"):
        plan.check(load_config("addition"))
    with pytest.raises(ValueError, match="--dollars-per-hour and --try are numbers"):
        plan.check(config, "cheap")
    with pytest.raises(ValueError, match="at least 0"):
        plan.check(config, "-1")
    with pytest.raises(FileNotFoundError, match="give a folder with its config.json"):
        plan.abstract_task(dataclasses.replace(config, teacher="nobody/nothing"))
    lora = dataclasses.replace(config.student, start=StartConfig("lora"))
    with pytest.raises(ValueError, match="in factors"):
        plan.abstract_task(dataclasses.replace(config, student=lora))
    assert plan.check(config, "1.5", "2") == (1.5, 2)


def test_a_student_of_fewer_words_is_planned_with_as_many(config):
    task = plan.abstract_task(dataclasses.replace(config, vocabulary=512))
    assert task.student.vocab_size == task.teacher.vocab_size == task.student.config.vocab_size == 512
    assert task.student.config.layers == 2 and task.teacher.config.layers == 3


def test_the_script_refuses_before_jax_starts():
    specification = importlib.util.spec_from_file_location("plan_script", Path(__file__).parents[1] / "scripts/plan.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    for arguments, said in (([], "expected such as v5e:4x4"), (["--topology", "v5e:7"], "expected 2 sizes")):
        with pytest.raises(ValueError, match=said):
            script.main(["--config", "qwen3_8b_to_0p6b", *arguments])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
def test_a_tpu_step_is_compiled_for_it(config):
    program = plan.compile_step(config, parse_topology("v5e:2x4"))
    assert program.fits and program.exchanged
    assert program.bytes["arguments"] < program.bytes["total"] < 1e9
