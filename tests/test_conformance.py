"""distill/losses/CONFORMANCE.md: every number is recomputed or compared. None of the libraries is needed here."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference

from distill.reproduce import conformance
from distill.reproduce.conformance import CALLS, CASES, CONVENTION, PEERS, ROWS

ROOT = Path(__file__).parents[1]
STORED = json.loads((ROOT / conformance.STORED).read_text())
CELLS = [(name, peer) for name in ROWS for peer in PEERS if peer in STORED["rows"].get(name, {})]


def is_close(value, other):
    """Equal up to rounding, or the same text; stored values hold NaN as text."""
    return bool(conformance.close(value, other) and value == value)


def test_ours_is_the_float64_definition():
    wrong = []
    for name, row in ROWS.items():
        stored = STORED["rows"][name]
        found = {
            "the definition": conformance.definition(row),
            "distill now": conformance.ours(row),
            "distill as stored": stored["distill"],
        }
        for source, value in found.items():
            if not is_close(value, stored["float64"]):
                wrong.append(f"{name}: {source} is {value}; stored {stored['float64']}")
    assert ROWS and not wrong, "\n".join(wrong)


def test_a_library_differs_where_the_page_explains_it_and_nowhere_else():
    wrong = []
    for name, peer in CELLS:
        text, value = conformance.expected(peer, ROWS[name])
        stored, definition = STORED["rows"][name][peer], STORED["rows"][name]["float64"]
        if not is_close(stored, value):
            wrong.append(f"{name}, {peer}: expected {value}; stored {stored}")
        if is_close(value, definition) is not (text in ("", CONVENTION)):
            wrong.append(f"{name}, {peer}: {value} beside {definition}, explained by {text!r}")
    assert CELLS and not wrong, "\n".join(wrong)


def test_every_loss_a_library_has_is_measured():
    wanted = [(name, peer) for name, row in ROWS.items() for peer in PEERS if conformance.expected(peer, row)]
    assert wanted == CELLS and len(CELLS) > 100
    assert STORED["rows"].keys() == ROWS.keys() and STORED["calls"].keys() == CALLS.keys()


def test_every_call_has_its_stored_value_and_not_that_of_the_plain_kl():
    wrong = []
    for name, call in CALLS.items():
        stored, value = STORED["calls"][name], call.value(call.case)
        if not is_close(stored, value):
            wrong.append(f"{name}: expected {value}; stored {stored}")
        if is_close(stored, conformance.definition(conformance.Row("forward_kl", call.case))):
            wrong.append(f"{name}: equal to the plain KL, {stored}: not worth a line")
    assert CALLS and not wrong, "\n".join(wrong)


def test_the_page_is_that_of_the_stored_values():
    assert (ROOT / conformance.PAGE).read_text() == conformance.page(STORED)


# The float64 column has two sources: sums over probabilities here, loops over log-probabilities there.
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_definitions_are_those_of_the_other_reference(temperature):
    case = CASES["T = 2" if temperature == 2.0 else "T = 1"]
    given = case.student, case.teacher
    for row in ROWS.values():
        if row.case is not case or row.squared:
            continue
        if row.loss in ("forward_kl", "reverse_kl"):
            want = getattr(reference, row.loss)(*given, temperature)
        elif row.loss == "generalized_jsd":
            want = reference.generalized_jsd(*given, dict(row.options)["beta"], temperature)
        elif row.loss == "cross_entropy":
            want = reference.cross_entropy(case.student, case.labels)
        else:
            continue
        np.testing.assert_allclose(conformance.definition(row), want.mean(), rtol=1e-12)


def test_numbers_by_hand():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.75, 0.0])
    half = np.log(2.0) / 2.0 + np.log(2.0 / 3.0) / 2.0
    assert conformance.DEFINITIONS["forward_kl"](p, q) == pytest.approx(half)
    assert conformance.DEFINITIONS["total_variation"](p, q) == pytest.approx(0.25)
    assert conformance.DEFINITIONS["teacher_entropy"](p, q) == pytest.approx(np.log(2.0))
    skewed = 0.5 * np.log(0.5 / 0.275) + 0.5 * np.log(0.5 / 0.725)
    assert conformance.DEFINITIONS["skewed_forward_kl"](p, q, alpha=0.1) == pytest.approx(skewed)
