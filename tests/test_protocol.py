"""The addition protocol: statistics, disjoint sets, replicas equal to single runs, and resumption."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from distill.data import addition
from distill.experiments.addition import protocol
from distill.experiments.addition import replicas as arms
from distill.experiments.addition.config import ProtocolConfig, Recipe, SweepConfig
from distill.models import DecoderConfig, decoder
from distill.objective import task_term
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.reproduce import addition as reproduce
from distill.train import Task, fit
from distill.training import LogConfig, TrainingConfig

DATA = addition.AdditionConfig(digits=1)
MODEL = DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=8)
TRAINING = TrainingConfig(steps=20, batch_size=8, steps_per_dispatch=10, evaluate_every=10, save_every=20)
CONFIG = ProtocolConfig(
    teacher=Recipe(dataclasses.replace(MODEL, width=16), dataclasses.replace(TRAINING, steps=60)),
    students={"small": Recipe(MODEL, TRAINING)},
    data=DATA,
    labels=(10,),
    seeds=2,
    sweep=SweepConfig(validation=10, steps=20, evaluate_every=10, batch_size=8, learning_rates=(1e-2,)),
)


def test_statistics_match_numbers_by_hand():
    got = protocol.statistics([0.9, 1.0, 0.8])
    half = 4.302653 * 0.1 / np.sqrt(3)  # t quantile of 2 degrees of freedom, standard deviation 0.1
    np.testing.assert_allclose(got["interval"], [0.9 - half, 0.9 + half], rtol=1e-5)
    assert got["worst"] == 0.8


def test_gap_closed_matches_numbers_by_hand():
    def row(arm, labels, mean):
        return {"student": "s", "arm": arm, "labels": labels, "mean": mean, "runs": 1, "cpu_seconds": 1.0}

    results = {"teacher": {"seeds": [0.9, 0.9]}, "rows": [row("alone", 10, 0.4), row("unlabelled", None, 0.8)]}
    results["rows"] += [row("alone", 20, 0.7), row("same_prompts", 20, 0.75)]
    protocol.close_gaps(results, dataclasses.replace(CONFIG, labels=(10, 20)))
    gaps = [r["gap_closed"] for r in results["rows"]]
    assert gaps[0] is None and gaps[2] is None
    np.testing.assert_allclose([gaps[1], gaps[3]], [0.8, 0.25])
    np.testing.assert_allclose(results["rows"][1]["gap_closed_by_labels"]["20"], 0.5)


def test_a_replica_equals_a_single_run(tmp_path):
    examples = addition.encode(DATA, addition.pairs(DATA)["train"]).batch(DATA)
    rates, decays = np.array([1e-2, 2e-2]), np.array([0.0, 1.0])
    replicas = arms.Replicas(arms.stack([examples] * 2), np.array([3, 4]), rates, decays)
    schedule = arms.Schedule(20, 8, 10, OptimizerConfig(), data_seed=4)
    together = arms.train(decoder(MODEL), [task_term()], replicas, schedule, DATA).params
    rate = OptimizerConfig(learning_rate=2e-2, weight_decay=1.0)
    training = dataclasses.replace(TRAINING, seed=4, optimizer=rate)
    task = Task(decoder(MODEL), [task_term()], examples)
    alone = {"log": LogConfig(progress=False), "parallel_config": ParallelConfig(backend="one_device")}
    params = fit(tmp_path, task, training, **alone)
    for a, b in zip(jax.tree.leaves(arms.pick(together, 1)), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_vmapped_replicas_equal_replicas_in_a_loop(monkeypatch):
    def function(x, y, shared):
        return x * shared, x + y

    x, y, shared = np.arange(3.0), np.arange(3.0) ** 2, np.float32(7.0)
    got = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        got.append(jax.device_get(arms.each(function, shared=1)(x, y, shared)))
    for a, b, want in zip(*got, (x * 7.0, x + y), strict=True):
        np.testing.assert_array_equal(a, want)
        np.testing.assert_array_equal(b, want)


def test_steps_are_chosen_by_exact_match_on_validation_only():
    params = {"w": np.arange(2.0)}
    best = arms._keep_best(None, params, np.array([0.5, 0.5]), 10)
    best = arms._keep_best(best, {"w": np.array([7.0, 8.0])}, np.array([0.4, 0.6]), 20)
    np.testing.assert_array_equal(best[0]["w"], [0.0, 8.0])
    np.testing.assert_array_equal(best[2], [10, 20])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("protocol")
    return run, protocol.run_protocol(CONFIG, run, say=lambda line: None)


def test_every_arm_has_a_row(finished):
    run, results = finished
    arms_done = {(row["arm"], row["labels"]) for row in results["rows"]}
    tuned = {("alone", 10), ("same_prompts", 10)}
    assert arms_done == tuned | {
        (arm, None) for arm in ("unlabelled", "skyline", "permuted_teacher", "independent_teacher")
    }
    assert json.loads((run / "arms.json").read_text()) == results
    assert all(len(row["seeds"]) == 2 for row in results["rows"])
    assert results["sweep"]["runs"] == 2 * 2 * CONFIG.sweep.runs


def test_a_resumed_protocol_repeats_nothing(finished):
    run, results = finished
    cut = {**results, "rows": results["rows"][:-1]}
    (run / "arms.json").write_text(json.dumps(cut))
    logged = []
    again = protocol.run_protocol(CONFIG, run, say=logged.append)
    assert len(logged) == 1 and again["rows"][:-1] == results["rows"][:-1]
    assert again["rows"][-1]["seeds"] == results["rows"][-1]["seeds"]


def test_workers_compute_the_same_rows(finished):
    run, results = finished
    (run / "arms.json").write_text(json.dumps({**results, "rows": results["rows"][2:]}))
    again = protocol.run_protocol(CONFIG, run, say=lambda line: None, workers=2)
    spent = {"seconds_spent", "cpu_seconds"}
    rows = {row["arm"]: {k: v for k, v in row.items() if k not in spent} for row in again["rows"]}
    assert rows == {row["arm"]: {k: v for k, v in row.items() if k not in spent} for row in results["rows"]}


def test_another_configuration_is_refused(finished):
    with pytest.raises(ValueError, match="seeds: 2 → 3"):
        protocol.run_protocol(dataclasses.replace(CONFIG, seeds=3), finished[0])


def test_labelled_and_validation_and_test_are_disjoint(finished):
    run, results = finished
    world = protocol.make_worlds(CONFIG, run, results)[0]
    order = np.random.default_rng([world.seed, 1]).permutation(len(world.train.tokens))
    few, validation = order[:10], order[10:20]
    assert not set(few) & set(validation)
    addition.assert_disjoint(world.config, world.train, world.test)


def test_the_section_has_every_row(finished):
    page = reproduce.addition_page(finished[1])
    for row in finished[1]["rows"]:
        assert f"| {row['arm']} |" in page and f"{row['mean']:.4f}" in page
