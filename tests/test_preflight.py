"""Preflight: findings before the first step."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from builders import handmade, on_device, random_params, tiny_decoder, uneven_batch
from text_builders import CHATML, MARKED, tiny_tokenizer

from distill.experiments.preflight import Side, memory_plan, preflight, print_checks
from distill.objective import ObjectiveConfig, terms_of
from distill.state import init_state
from distill.step import make_train_step

MODEL = tiny_decoder(layers=1)
BATCH = on_device(uneven_batch())
TERMS = terms_of(ObjectiveConfig(temperature=2.0))
WIDE = handmade(lambda tokens: jax.nn.one_hot(tokens, 320), 320)
IDS = {str(i): i for i in range(11)}


def knowing(nats):
    """A model that predicts the next token of BATCH with this logit."""
    return handmade(lambda tokens: nats * jax.nn.one_hot(BATCH.labels, 11))


def side(model, tokenizer=IDS):
    return Side(model, model.init(jax.random.key(0)), tokenizer)


def verdicts(checks):
    return {check.name: check.verdict for check in checks}


def test_a_good_pair_passes(tmp_path, capsys):
    checks = preflight(side(knowing(1.0)), side(knowing(4.0)), BATCH, TERMS, run=tmp_path)
    assert set(verdicts(checks).values()) == {"ok"} and "forward_kl at student = teacher" in verdicts(checks)
    written = json.loads((tmp_path / "preflight.json").read_text())
    for name, logit in (("student", 1.0), ("teacher", 4.0)):
        want = jnp.log(jnp.exp(logit) + 10.0) - logit
        assert written["nats_per_token"][name] == pytest.approx(float(want), rel=1e-4)
    print_checks(checks)
    assert "held-out loss" in capsys.readouterr().out


def test_a_teacher_worse_than_its_student_is_reported():
    checks = preflight(side(knowing(4.0)), side(knowing(1.0)), BATCH, TERMS)
    assert verdicts(checks)["held-out loss"] == "warning"
    assert "WORSE" in next(check.found for check in checks if check.name == "held-out loss")


def test_all_findings_are_reported_and_written(tmp_path):
    other = IDS | {"1": 2, "2": 1}
    bad = Side(knowing(1.0), {"unused": jnp.float32(jnp.nan)}, other)
    with pytest.raises(ValueError, match=r"(?s)2 ids different.*weights of the student: 1 are not.*logits of the"):
        preflight(bad, side(knowing(1.0)), BATCH, TERMS, run=tmp_path)

    def strict(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "preflight.json").read_text(), parse_constant=strict)
    assert written["nats_per_token"] == {
        "student": None,
        "teacher": pytest.approx(float(jnp.log(jnp.e + 10.0)) - 1.0, rel=1e-4),
    }


def test_special_tokens_and_templates_that_differ_are_reported():
    first, second = tiny_tokenizer(chat_template=CHATML), tiny_tokenizer(chat_template=MARKED, eos="<s>")
    checks = preflight(side(WIDE, first), side(WIDE, second), BATCH, TERMS)
    found = {check.name: check.found for check in checks if check.verdict == "warning"}
    assert found == {
        "eos_id": "2 and 1 (student's and teacher's)",
        "pad_id": "2 and 1 (student's and teacher's)",
        "chat_template": "differs (student's and teacher's)",
    }
    again = preflight(side(WIDE, first), side(WIDE, first), BATCH, TERMS)
    assert {check.verdict for check in again} == {"ok"}


def test_the_memory_of_the_step_is_compared_with_the_device():
    params, update = random_params(MODEL), optax.adam(0.1)
    state = init_state(params, update)
    step = jax.jit(make_train_step(MODEL, TERMS, update, teacher=MODEL), donate_argnums=0)
    plan = memory_plan(step.lower(state, params, BATCH), state, params)
    size = 4 * MODEL.parameter_count()
    assert plan["teacher"] == plan["student"] == plan["gradients"] == size and plan["optimizer"] == 2 * size + 4
    assert plan["arguments"] >= 4 * size and plan["temporary"] > 0 and plan["device"] > plan["total"]
    sides = side(knowing(1.0)), side(knowing(4.0))
    assert verdicts(preflight(*sides, BATCH, TERMS, plan=plan))["memory"] == "ok"
    with pytest.raises(ValueError, match="memory: .*use more micro_batches"):
        preflight(*sides, BATCH, TERMS, plan=plan | {"device": plan["total"] - 1})
