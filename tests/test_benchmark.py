"""Every benchmark at tiny shapes: its lines and its comparisons."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distill import config
from distill.benchmarks import attention, pair, rounds, scaling, tpu
from distill.benchmarks import head as benchmark_head
from distill.benchmarks import step as benchmark_step
from distill.benchmarks import tiny as benchmark
from distill.head import Head
from distill.losses import divide, masked_sum
from distill.parallel import ParallelConfig, make_mesh

ROOT = Path(__file__).parents[1]


# ---- tiny


def test_in_turn_excludes_the_warm_up_round():
    calls = []
    contestants = {name: functools.partial(lambda name, n: calls.append((name, n)), name) for name in "ab"}
    speeds = rounds.in_turn(contestants, steps=3, rounds=2)
    assert calls == [("a", 3), ("b", 3)] * 3
    assert {name: len(values) for name, values in speeds.items()} == {"a": 2, "b": 2}
    assert rounds.ratio({"a": [4.0, 1.0], "b": [2.0, 2.0]}, "a", "b") == [2.0, 0.5]
    assert rounds.spread([3.0, 1.0, 2.0]) == "2.00 [1.00, 3.00]"


def test_the_tiny_benchmark_compares_all_contestants(addition, monkeypatch):
    case = benchmark.Tiny(benchmark._model(1, 16), benchmark._model(1, 8), batch_size=8, steps=2)
    monkeypatch.setattr(benchmark, "TINY", (case,))
    monkeypatch.setattr(benchmark.addition, "load", lambda data: {"train": addition[1]["train"]})
    monkeypatch.setattr(benchmark.addition, "AdditionConfig", lambda: addition[0])
    monkeypatch.setattr(benchmark, "_process_seconds", lambda cache: 1.5)
    calls = []
    lines = benchmark.tiny({"a peer": lambda case, examples: calls.append})
    assert calls == [8] * 8  # four dispatches per round
    assert [line.partition(":")[0] for line in lines] == ["batch 8"] * 7 + [
        "start-up to the first step, cold",
        "start-up to the first step, with the compilation cache",
    ]
    assert lines[4].startswith("batch 8: distill / a peer = ")
    assert lines[2].startswith("batch 8: pmap, 8 devices ") and lines[6].startswith("batch 8: pmap, 8 devices / a peer")
    assert benchmark.time_data(steps=3) > 0


# ---- the head


def test_the_memory_line_of_the_head():
    (line,) = benchmark_head.memory((("a shape", 2048, 8, 16, 4096),))
    assert line.startswith("a shape, float32: plain 0.")
    assert float(line.removesuffix("x less").rpartition(" ")[2]) > 4


def test_the_time_line_of_the_head(monkeypatch):
    shapes = benchmark_head.head_shapes(32, 8, 16, 64, jnp.float32)
    speeds, ratios = benchmark_head._race(shapes, steps=1, rounds=2)
    assert len(speeds) == len(ratios) == 2 and min(speeds + ratios) > 0
    monkeypatch.setattr(benchmark_head, "_race", lambda shapes, steps, rounds: ([2.0], [3.0]))
    assert benchmark_head.speed((64,))[1] == (
        "2048 tokens, V=64, D=256/512, bfloat16: chunked 0.500 s, 3.00 [3.00, 3.00] times as fast as plain"
    )


def test_the_vocabulary_size_from_which_the_chunked_head_is_faster(monkeypatch):
    """The first vocabulary size from which it is faster in every round; a lost round makes it a later one."""
    ratios = {256: [1.1, 1.2], 512: [0.9, 1.3], 1024: [1.1, 1.5], 2048: [2.0, 3.0]}
    monkeypatch.setattr(benchmark_head, "_race", lambda shapes, steps, rounds: ([], ratios[shapes[1].shape[1]]))
    lines = benchmark_head.small_vocabularies(tuple(ratios))
    assert lines[4] == "2048 tokens, D=64/128, float32: chunked is faster in every round from V=1024 on"
    assert lines[6] == "2048 tokens, D=256/512, float32, V=512: chunked 1.10 [0.90, 1.30] times as fast as plain"
    assert len(lines) == 10


def test_the_memory_curve_of_the_head_is_drawn(tmp_path):
    figure = tmp_path / "a.png"
    assert benchmark_head.curve(figure, (32,), vocab=128).startswith(str(figure))
    assert figure.read_bytes().startswith(b"\x89PNG")


# ---- TPUs


def test_the_head_is_compiled_for_a_mesh():
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    lines = tpu.head_on(mesh, benchmark_head.head_shapes(2048, 8, 16, 640, jnp.float32))
    assert [line.partition(":")[0] for line in lines] == ["chunked"] * 3 + ["plain"] * 2
    assert "MiB, temporary " in lines[0]
    assert lines[1].startswith("chunked: exchanged for each chunk: ") and "gather" not in lines[1]
    assert lines[2].startswith("chunked: exchanged once: 2 all-gather (0.03 MiB)")


def test_collectives_are_parsed_from_the_text_of_a_tpu_program():
    text = """HloModule a
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}
%inner (p: f32[4]) -> f32[4] {
  %r = (f32[4]{0:T(128)S(1)}, bf16[2,3]{1,0}) all-reduce(%p, %q), replica_groups=[2,2]<=[4], to_apply=%add
}
%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = f32[4]{0} fusion(%g), kind=kCustom, calls=%inner
}
%condition (c: (s32[], f32[4])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %h = (f32[4], f32[8]) all-gather-start(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %d = f32[8] all-gather-done(%h)
}
"""
    assert tpu.collectives(text) == [("all-reduce", 28, (None,), 2), ("all-gather", 32, (), 4)]
    assert tpu.summary(tpu.collectives(text)) == [
        "exchanged for each chunk: 1 all-reduce (0.00 MiB)",
        "exchanged once: 1 all-gather (0.00 MiB)",
    ]


def test_a_program_that_does_not_fit_reports_its_memory():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory: it needs (25G).\nmore")
    assert tpu._too_large(full) == "Ran out of memory: it needs (25G)."
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tpu._too_large(jax.errors.JaxRuntimeError("INTERNAL: other"))


def test_a_missing_compiler_for_tpus_is_reported_with_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[tpu\]'"):
        tpu.tpu()


# ---- beside another library


def rival(mixture, arrays, factor=1.0):
    """The plain computation in place of another library."""

    def mean(hidden, kernel):
        logits, teacher_logits = Head(kernel).logits(hidden), Head(arrays[3]).logits(arrays[2])
        return divide(masked_sum(mixture.loss(logits, teacher_logits, arrays[4]), arrays[5]))

    def value():
        loss, gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(*arrays[:2])
        return loss, factor * gradients[0], gradients[1]

    return benchmark_head.Rival(lambda steps: None, value, lambda: 3_000_000)


def test_the_agreement_lines_of_another_head(monkeypatch):
    monkeypatch.setattr(benchmark_head, "MIXTURES", {"JSD": benchmark_head.MIXTURES["JSD"]})
    peers = {"other": functools.partial(rival, factor=1.1), "without": lambda mixture, arrays: None}
    (line,) = benchmark_head.agreement(peers, sizes=(24, 8, 12, 40))
    loss, hidden, head = (float(number) for number in re.findall(r"\de[+-]\d\d", line))
    assert hidden == 0.1 and max(loss, head) < 3e-6


def test_the_time_and_memory_lines_of_another_head(monkeypatch):
    kind = "JSD + cross-entropy"
    monkeypatch.setattr(benchmark_head, "MIXTURES", {kind: benchmark_head.MIXTURES[kind]})
    lines = benchmark_head.beside({"another": rival}, sizes=(24, 8, 12, 40), steps=1, rounds=2)
    assert len(lines) == 2
    assert lines[0].startswith("24 tokens, V=40, D=8/12, bfloat16, JSD + cross-entropy: distill ")
    assert "another 0.00 [" in lines[1] and "ms, peak 0.00 GB; distill 0.00 [" in lines[1]


# ---- attention, and a published pair


def test_the_line_of_an_attention_form():
    case = attention.CPU._replace(tokens=256, heads=2, groups=1, size=8, lengths=(64,))
    assert attention.far(case, 64) < 1e-5
    shifted = case._replace(form=lambda q, k, v, mask: 1.01 * attention.plain(q, k, v, mask))
    assert 5e-3 < attention.far(shifted, 64) < 2e-2
    (line,) = attention.attention(case, steps=1, rounds=1)
    assert re.match(r"256 tokens, 2 heads of 8, 1 groups, float32, texts of 64: blocks [\d.]+ ", line)
    assert re.search(r"[\d.]+ \[.*\] times as fast as plain, off by \de-0\d$", line)


def test_a_pair_reports_every_case_and_the_error_of_the_peer(tmp_path, monkeypatch):
    """Two small models in place of published ones; the line of a failed peer is its last line on stderr."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"intermediate_size": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True}
    for layers in (2, 3):
        (tmp_path / str(layers)).mkdir()
        values = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": layers} | sizes
        (tmp_path / str(layers) / "config.json").write_text(json.dumps(values))
    published = config.load_config("qwen3_8b_to_0p6b")
    student = dataclasses.replace(published.student, source=str(tmp_path / "2"))
    small = dataclasses.replace(published, teacher=str(tmp_path / "3"), student=student)
    monkeypatch.setattr(config, "load_config", lambda name: small if name == "small" else published)
    monkeypatch.setattr(pair, "CASES", pair.CASES[2:])
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import json, sys\ntask = json.loads(sys.argv[1])\nassert task['teacher_config']['num_hidden_layers']"
        " == 3\nprint('noise')\nprint(json.dumps([[2.0, 1.0, 4.0], 7.0, 'NVIDIA H100 80GB HBM3']))\n"
    )
    title, int8, alone, beside = pair.pair("small", 2, 16, peer, steps=1)
    assert title.endswith("2 x 16 tokens, activations in bfloat16")
    assert re.match(r"teacher in int8: [\d.]+ .* s, [\d,]+ tokens/s, [\d.]+ TFLOP/s, [\d.]+ GB, cpu$", int8), int8
    assert re.match(r"cross-entropy alone, no teacher: [\d.]+ ", alone) and alone.endswith("cpu")
    assert (
        beside
        == "PyTorch: 2.00 [1.00, 4.00] s, 16 tokens/s, 0.00 TFLOP/s, 0% of its peak, 7.0 GB, NVIDIA H100 80GB HBM3"
    )
    peer.write_text("raise SystemExit('CUDA out of memory')\n")
    monkeypatch.setattr(pair, "CASES", ())
    assert pair.pair("small", 2, 16, peer)[-1] == "PyTorch: CUDA out of memory"
    with pytest.raises(ValueError, match="at least 1 of each"):
        pair.pair("small", 0, 16, peer)


def test_only_published_pairs_are_measured():
    with pytest.raises(ValueError, match="addition names no two published models; expected one such as qwen3_8b"):
        pair.pair("addition", 1, 8, Path("peer.py"))


def test_without_a_gpu_liger_exits_with_2():
    command = [sys.executable, "scripts/benchmark.py", "liger"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: this measures on a GPU, and JAX sees only cpu; pip install -e '.[cuda]'.\n"


def test_contestants_of_a_step_take_turns(monkeypatch):
    rests = []
    monkeypatch.setattr(benchmark_step.time, "sleep", rests.append)
    worker = "import sys, json\nfor i, _ in enumerate(sys.stdin): print(json.dumps([float(i + 1), 7.0]), flush=True)"
    answers = benchmark_step.race({name: [sys.executable, "-c", worker] for name in "ab"}, rounds=2)
    assert answers == {name: [[3.0, 7.0], [4.0, 7.0]] for name in "ab"}  # two rounds of warm-up
    assert rests == [benchmark_step.REST] * 8  # one before every turn
    with pytest.raises(RuntimeError, match="step: c ended without an answer"):
        benchmark_step.race({"c": [sys.executable, "-c", ""]}, rounds=1)


def test_the_second_step_of_a_turn_counts():
    script = "; ".join(
        [
            "import step_worker",
            "now = [0.0]",  # a fake clock: the first step of a turn takes 9 s, the second 1 s
            "step_worker.time.perf_counter = lambda: now[0]",
            "[now.append(now.pop() + 9.0 - 8.0 * (i % 2)) for i, _ in enumerate(step_worker.turns())]",
        ]
    )
    command = [sys.executable, "-c", script, "{}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts/peers")}
    done = subprocess.run(command, env=environment, input="go\ngo\n", capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [seconds for seconds, _ in answers] == [1.0, 1.0] and min(mb for _, mb in answers) > 1


def test_every_contestant_gets_large_pages_unless_the_caller_sets_them(monkeypatch):
    show = "import json, os; input(); print(json.dumps([len(os.environ['GLIBC_TUNABLES']), 0]))\n" * 3
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(benchmark_step, "REST", 0.0)
    command = {"a": [sys.executable, "-uc", show]}
    assert benchmark_step.race(command, rounds=1)["a"][0][0] == len("glibc.malloc.hugetlb=1")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0:")
    assert benchmark_step.race(command, rounds=1)["a"][0][0] == len("glibc.malloc.hugetlb=0:")


def test_a_step_reports_missing_modules_and_refuses_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(
        benchmark_step, "SCRIPTS", {"us": ("us", ()), "here": ("here_step", ("json",)), "gone": ("b", ("no_such",))}
    )
    found, lacks = benchmark_step.commands(tmp_path, ["here=" + sys.executable], "{}")
    assert found.pop("us")[0] == sys.executable
    assert found == {"here": [sys.executable, str(tmp_path / "here_step.py"), "{}"]}
    assert lacks == {"gone": "no_such"}
    assert benchmark_step.commands(tmp_path, ["gone=/no/python"], "")[1] == {
        "gone": "/no/python: No such file or directory"
    }
    for wrong in ("other=python", "here", "here=", "us=python"):
        with pytest.raises(ValueError, match=f"--python {wrong}: write NAME=PATH with a NAME of here, gone"):
            benchmark_step.commands(tmp_path, [wrong], "")
    for vocab, count in ((1, 1), (9, 0)):
        with pytest.raises(ValueError, match="at least 2 tokens and 1 round"):
            benchmark_step.step(vocab, count, tmp_path, [])


def test_the_table_of_a_step_matches_numbers_by_hand():
    work = benchmark_step.flops(512)
    inner = 4 * (4 * 256**2 + 3 * 256 * 768), 8 * (4 * 512**2 + 3 * 512 * 1536)  # multiply-adds per token, by hand
    heads, scores = (256 * 512, 512 * 512), (4 * 256 * 257, 8 * 512 * 257)  # queries · keys and weights · values
    student, teacher = (2 * (a + b + c) for a, b, c in zip(inner, heads, scores, strict=True))
    assert work == 2048 * (3 * student + teacher)
    second = benchmark_step.PRODUCTS / work  # then the peak is one step per second
    answers = {"distill": [[2.0, 5.0], [2.0, 6.0]], "it": [[4.0, 9.0], [8.0, 7.0]], "matmul": [[second, 1], [9e9, 1]]}
    assert benchmark_step.table(512, answers)[2:4] == [
        "| 512 | distill | 2.00 [2.00, 2.00] | 1.00 [1.00, 1.00] | 50% | 6 |",
        "| 512 | it | 6.00 [4.00, 8.00] | 0.38 [0.25, 0.50] | 17% | 9 |",
    ]


# ---- scaling

SHAPE = scaling.Shape(batch=8, length=16, layers=1, width=32, vocab=64)


@pytest.fixture(scope="module")
def scaled():
    """Mesh → its measurements over two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "STEPS", 2)
        names = ("1", "8 data", "8 fsdp")
        devices = {name: jax.devices()[: scaling.MESHES[name][0]] for name in names}
        return {name: scaling.measure(name, devices[name], SHAPE) for name in names}


def test_compiled_collectives_match_the_formula(scaled):
    """data: a sum of the gradients; fsdp: parameters gathered in both passes; neither exchanges activations."""
    assert sum(scaled["1"]["compiled"].values()) == 0.0
    compiled = {
        name: sum(scaled[name]["compiled"].values()) / scaled[name]["computed"] for name in ("8 data", "8 fsdp")
    }
    assert 1.0 <= compiled["8 data"] < 1.05  # with a few scalars
    assert 0.6 < compiled["8 fsdp"] < 1.05  # some of what was gathered is kept for the backward pass
    assert set(scaled["8 data"]["compiled"]) == {"all-reduce"}


def test_the_lines_of_the_scaling_benchmark(scaled, tmp_path):
    lines = scaling.table(scaled)
    assert len(lines) == 2 + len(scaled)
    assert all(float(line.split("|")[3]) < 1e-6 for line in lines[2:])
    lines, numbers = scaling.curves(2, tmp_path, {"tokens": [SHAPE]})
    assert len(lines) == 3 and numbers["tokens"][0]["at"] == 128 and len(numbers["tokens"][0]["seconds"]) == 2
    assert (tmp_path / "benchmark_scaling_tokens.png").exists()
