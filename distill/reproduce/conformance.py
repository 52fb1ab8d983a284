"""distill/losses/CONFORMANCE.md: our losses beside float64 definitions and the values of other libraries.

A row is a loss on a case, averaged over the positions that count. For every row and every library the page states the
difference in a sentence. ``expected`` computes that difference, as the float64 definition under the library's
convention, and the tests compare it with the values that the libraries returned (``tests/conformance.json``).
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.errors import UserError
from distill.objective import DIVERGENCES, ObjectiveConfig, distillation_term
from distill.term import View
from distill.vocab import Alignment

PAGE, STORED = Path("distill/losses/CONFORMANCE.md"), Path("tests/conformance.json")
PEERS = ("TRL GKD", "TRL Distillation", "Liger chunked", "Liger Triton", "DistiLLM")
Value = float | str
"""A number, or ``"nan"``, or ``"refused"``: an exception."""


# ---- the inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits ``[2, 5, rows]``, labels and a mask ``[2, 5]``; rows above ``vocab`` are padding of the head."""

    name: str
    student: np.ndarray
    teacher: np.ndarray
    mask: np.ndarray
    temperature: float = 1.0
    vocab: int = 7

    @property
    def labels(self) -> np.ndarray:
        """Ids below ``vocab``; −100 marks positions that do not count, as in PyTorch libraries."""
        ids = np.arange(self.mask.size).reshape(self.mask.shape) * 3 % self.vocab
        return np.where(self.mask, ids, -100)


def _cases() -> dict[str, Case]:
    rng = np.random.default_rng(0)
    student, teacher = (2.0 * rng.normal(size=(2, 5, 10)).astype(np.float32) for _ in range(2))
    all_of_it, some = np.ones((2, 5), bool), np.arange(5) < np.array([[2], [4]])
    seven, truth = student[..., :7], teacher[..., :7]

    def with_logit(logits: np.ndarray, value: float) -> np.ndarray:
        return np.where(np.arange(7) == 3, np.float32(value), logits)

    padded_truth = np.where(np.arange(10) < 7, teacher, np.float32(-1.0))
    cases = [
        Case("T = 1", seven, truth, all_of_it),
        Case("T = 2", seven, truth, all_of_it, temperature=2.0),
        Case("6 of 10 positions count", seven, truth, some),
        Case("NaN where nothing counts", np.where(some[..., None], seven, np.nan), truth, some),
        Case("nothing counts", seven, truth, ~all_of_it),
        Case("student = teacher", truth, truth, all_of_it),
        Case("student = teacher, 3 more rows in the teacher", truth, padded_truth, all_of_it),
        Case("7 tokens, 7 and 10 rows", seven, teacher, all_of_it),
        Case("7 tokens, 10 and 10 rows", student, teacher, all_of_it),
        Case("a token at −inf on both sides", with_logit(seven, -np.inf), with_logit(truth, -np.inf), all_of_it),
        Case("a token at −10 000 on both sides", with_logit(seven, -1e4), with_logit(truth, -1e4), all_of_it),
    ]
    return {case.name: case for case in cases}


CASES = _cases()


@dataclasses.dataclass(frozen=True)
class Row:
    """A loss, its hyperparameters and a case; ``squared``: as a term of the objective, T² included."""

    loss: str
    case: Case
    options: tuple[tuple[str, float], ...] = ()
    squared: bool = False

    @property
    def name(self) -> str:
        """Unique name of the row."""
        options = "".join(f", {'α' if key == 'alpha' else 'β'} = {value}" for key, value in self.options)
        return f"{self.loss}{options}{', objective' if self.squared else ''} | {self.case.name}"


def _rows() -> list[Row]:
    kls, skews = [("forward_kl",), ("reverse_kl",)], [("skewed_forward_kl", "α"), ("skewed_reverse_kl", "α")]
    jsds = {beta: ("generalized_jsd", beta) for beta in (0.1, 0.5, 0.9)}
    some = [*kls, jsds[0.1], jsds[0.5], *skews]
    few = [kls[0], jsds[0.5], skews[0]]
    chosen = {
        "T = 1": [*kls, *jsds.values(), *skews, ("jeffreys",), ("total_variation",), ("cross_entropy",)],
        "T = 2": [*some, ("total_variation",), ("forward_kl", "T²"), ("cross_entropy",)],
        "6 of 10 positions count": [*some, ("total_variation",), ("cross_entropy",)],
        "student = teacher": [*kls, jsds[0.5], *skews, ("total_variation",)],
    }
    rows = []
    for case in CASES.values():
        for loss, *option in chosen.get(case.name, few):
            key = {"generalized_jsd": "beta", "skewed_forward_kl": "alpha", "skewed_reverse_kl": "alpha"}.get(loss)
            value = 0.1 if option == ["α"] else (option or [None])[0]
            rows.append(Row(loss, case, ((key, value),) if key else (), squared=option == ["T²"]))
    return rows


ROWS = {row.name: row for row in _rows()}


# ---- float64, straight from the definitions: probabilities only, without log-sum-exp


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities in float64."""
    x = np.asarray(logits, np.float64) / temperature
    x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return x / np.sum(x, axis=-1, keepdims=True)


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Σ a·log(a/b) over the tokens where a > 0."""
    there = a > 0.0
    return np.sum(np.where(there, a * np.log(np.where(there, a, 1.0) / np.where(there, b, 1.0)), 0.0), axis=-1)


def _jsd(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1.0 - beta) * q
    return beta * kl(p, m) + (1.0 - beta) * kl(q, m)


DEFINITIONS: dict[str, Callable[..., np.ndarray]] = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "generalized_jsd": lambda p, q, beta: _jsd(p, q, beta),
    "skewed_forward_kl": lambda p, q, alpha: kl(p, alpha * p + (1.0 - alpha) * q),
    "skewed_reverse_kl": lambda p, q, alpha: kl(q, (1.0 - alpha) * p + alpha * q),
    "jeffreys": lambda p, q: kl(p, q) + kl(q, p),
    "total_variation": lambda p, q: np.abs(p - q).sum(axis=-1) / 2.0,
    "teacher_entropy": lambda p, q: -kl(p, np.ones_like(p)),
}


def definition(row: Row, **changed: Any) -> float:
    """Float64 mean over the counted positions; ``changed`` replaces fields of the case."""
    case = dataclasses.replace(row.case, **changed)
    if not case.mask.any():
        return 0.0
    student, teacher = (logits[case.mask][:, : case.vocab] for logits in (case.student, case.teacher))
    if row.loss == "cross_entropy":
        return float(np.mean(-np.log(np.take_along_axis(softmax(student, 1.0), case.labels[case.mask][:, None], 1))))
    p, q = softmax(teacher, case.temperature), softmax(student, case.temperature)
    factor = case.temperature**2 if row.squared else 1.0
    return factor * float(np.mean(DEFINITIONS[row.loss](p, q, **dict(row.options))))


def ours(row: Row) -> float:
    """The value of this library in float32, by the public functions."""
    case = row.case
    alignment = Alignment(case.vocab, case.student.shape[-1], case.teacher.shape[-1])
    student, teacher = alignment.match(jnp.asarray(case.student), jnp.asarray(case.teacher))
    weight = 1.0
    if row.loss == "cross_entropy":
        nats = losses.cross_entropy(student, jnp.asarray(np.where(case.mask, case.labels, 0), jnp.int32))
    elif row.squared:
        term = distillation_term(ObjectiveConfig(row.loss, temperature=case.temperature))
        nats, weight = term.value(View(student, teacher)), term.weight
    else:
        nats = DIVERGENCES[row.loss](student, teacher, temperature=case.temperature, **dict(row.options))
    return weight * float(losses.divide(losses.masked_sum(nats, jnp.asarray(case.mask))))


# ---- the conventions of other libraries, in float64

GENERALISED = {"forward_kl", "reverse_kl", "generalized_jsd"}
HAS = {
    "TRL GKD": GENERALISED,
    "TRL Distillation": GENERALISED,
    "Liger chunked": GENERALISED | {"cross_entropy"},
    "Liger Triton": GENERALISED | {"total_variation"},
    "DistiLLM": GENERALISED | {"skewed_forward_kl", "skewed_reverse_kl", "jeffreys", "total_variation"},
}


def expected(peer: str, row: Row) -> tuple[str, Value] | None:
    """Description of how a library's value differs ("": not at all), and that value; None: it lacks this loss."""
    case = row.case
    if row.loss not in HAS[peer]:
        return None
    if case.student.shape[-1] < case.teacher.shape[-1] and (found := _narrower_student(peer, row)):
        return found
    if peer == "DistiLLM":
        return _distillm(row)
    if np.isneginf(case.student).any():
        return "0·(−∞ + ∞)", "nan"
    texts = []
    if case.student.shape[-1] > case.vocab:
        texts, row = ["padded rows count as tokens"], dataclasses.replace(row, case=_all_rows(case))
    if row.squared:
        texts, row = [*texts, "no T²: a quarter"], dataclasses.replace(row, squared=False)
    return "; ".join(texts), definition(row)


def _all_rows(case: Case) -> Case:
    return dataclasses.replace(case, vocab=case.student.shape[-1])


def _narrower_student(peer: str, row: Row) -> tuple[str, Value] | None:
    case = row.case
    if peer == "Liger chunked":
        missing = np.zeros((*case.student.shape[:-1], case.teacher.shape[-1] - case.student.shape[-1]), np.float32)
        wide = _all_rows(dataclasses.replace(case, student=np.concatenate([case.student, missing], -1)))
        return "gives the student zero logits for the rows it does not have", definition(
            dataclasses.replace(row, case=wide)
        )
    if peer == "Liger Triton":
        p = softmax(case.teacher, case.temperature)[..., : case.vocab]
        nats = DEFINITIONS[row.loss](p, softmax(case.student, case.temperature), **dict(row.options))
        return "cuts the teacher's distribution and does not renormalise it", float(np.mean(nats[case.mask]))
    return None if peer == "TRL Distillation" else ("refuses two widths", "refused")


def _distillm(row: Row) -> tuple[str, Value]:
    case = row.case
    if not case.mask.any():
        return "0/0", "nan"
    if np.isnan(case.student).any():
        return "multiplies by the mask: NaN·0", "nan"
    if np.any(case.student == np.float32(-1e4)) and row.loss in ("generalized_jsd", "skewed_forward_kl"):
        return "the mixture underflows: 0·log 0", "nan"
    texts = ["padded rows count as tokens"] if case.student.shape[-1] > case.vocab else []
    if case.temperature != 1.0:
        texts.append("no temperature: the value at T = 1")
    at_one = dataclasses.replace(row, case=dataclasses.replace(_all_rows(case), temperature=1.0), squared=False)
    value, entropy = definition(at_one), definition(Row("teacher_entropy", at_one.case))
    if row.loss in ("forward_kl", "skewed_forward_kl"):
        texts, value = [*texts, "+ H(P), the teacher's entropy"], value + entropy
    if row.loss == "jeffreys":
        texts, value = [*texts, "`symmetric_kl` at λ = ½: half of Jeffreys + H(P)"], (value + entropy) / 2.0
    if row.loss == "generalized_jsd":
        texts.append(CONVENTION)
    return "; ".join(texts), value


CONVENTION = "its λ is 1 − β"
"""A difference of names; the value is equal."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that looks like a row but computes something else: its code, a description, and its value in float64."""

    code: str
    case: Case
    text: str
    value: Callable[[Case], float]


def _forward(case: Case, **changed: Any) -> float:
    return definition(Row("forward_kl", case), **changed)


def _half_and_half(case: Case) -> float:
    soft = definition(Row("generalized_jsd", case, (("beta", 0.5),)))
    return (soft + definition(Row("cross_entropy", case))) / 2.0


def _symmetric(case: Case) -> float:
    rows = [Row(loss, case) for loss in ("forward_kl", "teacher_entropy", "reverse_kl")]
    return sum(weight * definition(row) for weight, row in zip((0.1, 0.1, 0.9), rows, strict=True))


def _calls() -> dict[str, Call]:
    one, two, some = CASES["T = 1"], CASES["T = 2"], CASES["6 of 10 positions count"]
    everywhere = np.ones((2, 5), bool)
    return {
        "TRL compute_loss": Call(
            "`GKDTrainer.compute_loss`, `temperature=2`, β = 0",
            two,
            "T = 1: the temperature of its configuration is that of sampling and does not reach the loss",
            lambda case: _forward(case, temperature=1.0),
        ),
        "TRL no labels": Call(
            "`GKDTrainer.generalized_jsd_loss` without labels, β = 0",
            one,
            "divided by the number of sequences: 5 times ours",
            lambda case: 5.0 * _forward(case),
        ),
        "TRL mean": Call(
            '`GKDTrainer.generalized_jsd_loss(reduction="mean")`, β = 0',
            some,
            "divided by positions · vocabulary size: a seventh",
            lambda case: _forward(case) / 7.0,
        ),
        "Liger defaults": Call(
            "`LigerFusedLinearJSDLoss(temperature=2)`, other arguments left out",
            two,
            "½ JSD(½) at T = 2 + ½ cross-entropy at T = 1, no T²",
            _half_and_half,
        ),
        "Liger KL": Call(
            '`LigerKLDIVLoss(reduction="batchmean")`, positions flat',
            some,
            "takes no labels: every position counts",
            lambda case: _forward(case, mask=everywhere),
        ),
        "Liger KL mean": Call(
            '`LigerKLDIVLoss(reduction="mean")`, positions flat',
            one,
            "divided by positions · vocabulary size: a seventh",
            lambda case: _forward(case) / 7.0,
        ),
        "PyTorch batchmean": Call(
            '`F.kl_div(reduction="batchmean")` of `[2, 5, 7]`',
            one,
            "divided by the first axis, the sequences: 5 times ours",
            lambda case: 5.0 * _forward(case),
        ),
        "PyTorch mean": Call(
            '`F.kl_div(reduction="mean")`',
            one,
            "divided by positions · vocabulary size: a seventh",
            lambda case: _forward(case) / 7.0,
        ),
        "DistiLLM symmetric": Call(
            "`symmetric_kl`, λ left at 0.9",
            one,
            "0.1 · (forward KL + H(P)) + 0.9 · reverse KL",
            _symmetric,
        ),
        "DistiLLM JS": Call(
            "`js_distance`, λ left at 0.9",
            one,
            "our β = 0.1: λ is the student's share, β the teacher's",
            lambda case: definition(Row("generalized_jsd", case, (("beta", 0.1),))),
        ),
    }


CALLS = _calls()


# ---- the page


def run(peers: str) -> None:
    """Measures the libraries with the module in the folder ``peers``; writes the stored values and the page.

    Raises:
      UserError: a library is missing.
    """
    sys.path.append(peers)
    try:
        import torch_conformance
    except ImportError as error:
        raise UserError(f"{error}: a library is missing; pip install -e '.[conformance]'.") from error
    collect(*torch_conformance.measure())
    print(f"written: {STORED}, {PAGE}")


def collect(peer_values: dict[str, dict[str, Value]], call_values: dict[str, Value], versions: dict[str, str]) -> None:
    """Stores every value and writes the page; ``peer_values`` maps row → library → value."""
    rows = {name: {"float64": definition(row), "distill": ours(row)} | peer_values[name] for name, row in ROWS.items()}
    stored = {"versions": versions, "rows": rows, "calls": call_values}
    STORED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(stored))


def close(one: Value, other: Value) -> bool:
    """Whether numbers are equal to 1e-5, or texts are the same."""
    texts = isinstance(one, str) or isinstance(other, str)
    return one == other if texts else math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-5)


def page(stored: dict[str, Any]) -> str:
    """Formats the stored values as a Markdown page."""
    lines = [TOP.format(versions=", ".join(f"{name} {number}" for name, number in stored["versions"].items()))]
    for case in CASES.values():
        lines += ["", f"## {case.name[0].upper()}{case.name[1:]}", ""]
        columns = ("loss", "float64", "distill", *PEERS, "what differs")
        lines += [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 2)}|---|"]
        lines += [_line(row, stored["rows"][name]) for name, row in ROWS.items() if row.case is case]
    lines += ["", "## Calls that mean something else", ""]
    lines += ["| call | case | value | forward KL | what it is |", "|---|---|---:|---:|---|"]
    for name, call in CALLS.items():
        numbers = f"{_shown(stored['calls'][name])} | {_shown(_forward(call.case))}"
        lines.append(f"| {call.code} | {call.case.name} | {numbers} | {call.text} |")
    return "\n".join(lines) + "\n" + BOTTOM


def _line(row: Row, values: dict[str, Value]) -> str:
    differences = {peer: found[0] for peer in PEERS if (found := expected(peer, row))}
    cells = [_shown(values["float64"]), _shown(values["distill"])]
    for peer in PEERS:
        shown = _shown(values[peer]) if peer in values else "–"
        cells.append(shown if peer not in values or close(values[peer], values["float64"]) else f"**{shown}**")
    together: dict[str, list[str]] = {}
    for peer, text in differences.items():
        if text:
            together.setdefault(text, []).append(peer)
    texts = [f"{', '.join(names)}: {text}" for text, names in together.items()]
    return f"| {row.name.split(' | ')[0]} | {' | '.join(cells)} | {'. '.join(texts)} |"


def _shown(value: Value) -> str:
    if isinstance(value, str):
        return {"nan": "NaN"}.get(value, value)
    return "0" if abs(value) < 1e-6 else f"{value:.5f}".replace("-", "−")


TOP = """# The losses beside those of other libraries

Written by `python scripts/reproduce.py conformance`, which calls the libraries on CPU:
{versions}.
Liger's Triton kernels run in Triton's interpreter. DistiLLM is not a package: its column is a reimplementation of its
published functions in numpy (`scripts/peers/distillm_losses.py`). A test checks every number: *float64* and *distill*
are equal to 1e-5, and so are a library's value and float64 under the convention of the last column. Bold values differ
from ours.

P is the teacher's distribution, Q the student's, V the vocabulary size. A case has two sequences of five positions and
a vocabulary of seven tokens. Every value is the mean over the positions that count. 0 means below 1e-6, – that the
library lacks the loss, *refused* an exception. *Objective* is the term of the objective, T² included. Padded rows have
random logits, or −1 where student = teacher.

*TRL GKD* is `GKDTrainer.generalized_jsd_loss`, *TRL Distillation* the loss of `DistillationTrainer`, *Liger chunked*
`LigerFusedLinearJSDLoss` (for cross-entropy its hard loss), *Liger Triton* `LigerFusedLinearJSD` and `LigerTVDLoss`.
Their forward and reverse KL are β = 0 and β = 1. β is the teacher's share of the mixture, except in DistiLLM."""

BOTTOM = """
## Where a library differs from the paper it implements

* **TRL, GKD** (arXiv 2306.13649). β is the paper's. The paper averages each sequence over its tokens and then over the
  sequences. TRL divides by the tokens of the batch, as we do unless `reduction="sequence_mean"` is set.
* **Distillation with a temperature** (arXiv 1503.02531). The paper multiplies by T². TRL, Liger and DistiLLM do not.
  Our losses do not either, but the objective does, unless `temperature_squared=False`.
* **DistiLLM** (arXiv 2402.03898). α is the paper's. Its forward and skewed forward KL are cross-entropies, the paper's
  divergences plus the teacher's entropy: the gradient is the same, but the value is not 0 at Q = P.

The libraries differ most where the head has padded rows, which the papers do not cover. TRL's `DistillationTrainer`
cuts the teacher to the rows of the student, which is correct if those are the vocabulary. Liger's chunked loss gives a
narrower student zero logits, which have probability. Its Triton kernel reads the first V of the teacher's
log-probabilities, whose probabilities then sum to less than one, so its KL can be negative. Here padded rows are at
−inf on both sides (`distill/vocab.py`).
"""
