"""Initial parameters of a student by its configuration."""

import dataclasses

import jax
import numpy as np
import pytest
from builders import random_params, tiny

from distill.models import decoder
from distill.students.config import StartConfig
from distill.students.layers import CHOICES
from distill.students.start import outline, start

BIG, SMALL = tiny(layers=4), tiny(layers=2, head_dim=2)
TEACHER = decoder(BIG)


@pytest.fixture(scope="module")
def params():
    return random_params(TEACHER)


@pytest.mark.parametrize(
    "options",
    [
        StartConfig(),
        StartConfig("embeddings"),
        StartConfig("teacher", choice="ends"),
        StartConfig("teacher", layers=(3, 1), share_embeddings=True),
        StartConfig("low_rank", rank=2),
        StartConfig("lora", rank=2, kernels=("query",)),
    ],
    ids=lambda options: options.kind,
)
def test_every_start_ends_as_a_plain_decoder(params, options):
    begin = start(TEACHER, params, SMALL, options)
    learnt = begin.learnt(jax.random.key(0))
    shapes = jax.eval_shape(outline(TEACHER, SMALL, options).init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, learnt) == jax.tree.map(lambda x: x.shape, shapes)
    plain = begin.plain(learnt)
    wanted = jax.eval_shape(decoder(SMALL).init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, plain) == jax.tree.map(lambda x: x.shape, wanted)
    if options.kind != "random":
        np.testing.assert_array_equal(plain["embedding"], params["embedding"])
    if options.share_embeddings:
        assert begin.base["embedding"] is params["embedding"] and "embedding" not in learnt
        np.testing.assert_array_equal(
            plain["layers"]["mlp"]["up"]["kernel"][0], params["layers"]["mlp"]["up"]["kernel"][3]
        )


def test_a_student_with_lora_shares_the_teachers_parameters(params):
    begin = start(TEACHER, params, dataclasses.replace(BIG, head_dim=2), StartConfig("lora", rank=1))
    assert all(a is b for a, b in zip(jax.tree.leaves(begin.base), jax.tree.leaves(params), strict=True))


def test_chosen_layers_are_copied():
    assert {name: choose(3, 7) for name, choose in CHOICES.items()} == {
        "spread": (0, 3, 6),
        "every": (0, 2, 4),
        "ends": (0, 1, 6),
        "first": (0, 1, 2),
    }


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (SMALL, {"kind": "teacher", "layers": (1,)}, r"layers=\(1,\) are 1; the student has 2"),
        (SMALL, {"kind": "random", "rank": 4}, "rank=4 is read only with kind low_rank or lora"),
        (SMALL, {"kind": "lora", "alpha": 0.0}, "expected rank ≥ 1 and alpha > 0"),
        (tiny(width=4, head_dim=2), {"kind": "embeddings"}, "can be shared where width"),
        (tiny(feed_forward=6, head_dim=2), {"kind": "teacher"}, "needs a Calibration"),
    ],
)
def test_invalid_starts_are_refused(params, student, options, message):
    with pytest.raises(ValueError, match=message):
        start(TEACHER, params, student, StartConfig(**options))
