"""Configurations: values of the wrong type, of no choice, or that nothing reads are refused by name."""

import dataclasses
import typing

import pytest

from distill import cli
from distill.checkpoint import KeepConfig
from distill.config import from_dict, load_config, to_dict
from distill.data.addition import AdditionConfig
from distill.errors import UserError, check_fields
from distill.experiments.addition.config import Config, SweepConfig
from distill.experiments.sentences.config import SentenceConfig
from distill.experiments.text.config import StudentConfig, TextConfig
from distill.features import FeatureConfig
from distill.objective import DIVERGENCES, ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.students.config import StartConfig
from distill.teacher.signal import SignalConfig
from distill.training import LogConfig, TrainingConfig

KINDS = (
    Config, SweepConfig, AdditionConfig, TextConfig, StudentConfig, SentenceConfig, FeatureConfig, KeepConfig,
    ObjectiveConfig, OptimizerConfig, ParallelConfig, StartConfig, SignalConfig, LogConfig, TrainingConfig,
)  # fmt: skip
MADE = {StudentConfig: {"layers": 2}}
"""Arguments without which a configuration cannot be made."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_refuses_what_is_not_of_its_type(kind):
    """A word that is no choice names the choices; a number in a text, NaN, and a list are refused, field by field."""
    hints, accepted = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        for wrong in ("zzz", b"x", float("nan"), object(), [1]):
            text = hints[field.name] in (str, str | None)
            if wrong == "zzz" and text:
                continue
            try:
                kind(**(MADE.get(kind, {}) | {field.name: wrong}))
                accepted.append((field.name, wrong))
            except UserError as error:
                assert f"{field.name}=" in str(error), error
                assert "expected" in str(error)
    assert not accepted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig(divergence="kl"), "divergence='kl'; expected one of forward_kl, reverse"),
        (lambda: ObjectiveConfig(divergence="reverse_KL"), "Did you mean 'reverse_kl'"),
        (lambda: ParallelConfig(backend="tpu"), "backend='tpu'; expected one of auto, one_device, mesh, pmap"),
        (lambda: TrainingConfig(remat="some"), "remat='some'; expected one of none, dots, full"),
        (lambda: TrainingConfig(steps=True), "steps=True; expected a whole number"),
        (lambda: TrainingConfig(steps=10.0), "steps=10.0; expected a whole number"),
        (lambda: OptimizerConfig(schedule="cos"), "schedule='cos'; expected one of cosine, linear, constant"),
        (lambda: ObjectiveConfig(kd_weight=float("inf")), "kd_weight=inf; expected a finite number"),
    ],
)  # fmt: skip
def test_a_wrong_word_names_the_choices(make, message):
    with pytest.raises(UserError, match=message):
        make()


OWN = {"beta": 0.25, "alpha": 0.25, "mu": 0.25, "interpolation": 0.25}
READ = {
    "generalized_jsd": {"beta"}, "skewed_forward_kl": {"alpha"}, "skewed_reverse_kl": {"alpha"},
    "alpha_beta": {"alpha", "beta"}, "alpha_divergence": {"alpha"}, "renyi": {"alpha"}, "adaptive_kl": {"mu"},
    "taid": {"interpolation"},
}  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_hyperparameter_of_another_divergence_is_refused(divergence):
    for name, value in OWN.items():
        if name in READ.get(divergence, set()):
            ObjectiveConfig(divergence=divergence, **{name: value})
        else:
            with pytest.raises(UserError, match=f"{name}=0.25 is read only with divergence "):
                ObjectiveConfig(divergence=divergence, **{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ObjectiveConfig("forward_kl", final_interpolation=1.0, schedule_steps=5), "final_interpolation"),
        (lambda: ObjectiveConfig(schedule_steps=5), "schedule_steps"),
        (lambda: FeatureConfig(average_heads=True), "average_heads"),
        (lambda: FeatureConfig(hidden_loss="mse"), "hidden_loss"),
        (lambda: FeatureConfig(relation_weight=1.0, layers="last"), "layers"),
        (lambda: FeatureConfig(attention_weight=1.0, relation_heads=2), "relation_heads"),
        (lambda: StartConfig("random", rank=4), "rank"),
        (lambda: StartConfig("low_rank", alpha=4.0), "alpha"),
        (lambda: SignalConfig("live", k=8), "k"),
        (lambda: TrainingConfig(skips_in_a_row=3), "skips_in_a_row"),
        (lambda: StudentConfig(layers=2, calibration_batches=3), "calibration_batches"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(make, name):
    with pytest.raises(UserError, match=f"{name}=.* is read only with .*; set that, or leave it out \\(default: "):
        make()


@pytest.mark.parametrize(
    "name", ["addition", "addition_arms", "minilm", "qwen_coder", "smollm2_text", "llama3_70b_to_8b"]
)
def test_the_published_configurations_hold(name):
    load_config(name)


def test_whole_numbers_are_numbers_and_tuples_are_checked_inside():
    @dataclasses.dataclass(frozen=True)
    class Some:
        rate: float = 1.0
        sizes: tuple[int, ...] = ()
        name: str | None = None

        def __post_init__(self):
            check_fields(self, "some")

    assert Some(rate=2, sizes=(1, 2), name="a").rate == 2
    with pytest.raises(UserError, match=r"some: sizes=\(1, 'a'\); expected a tuple, each a whole number"):
        Some(sizes=(1, "a"))
    with pytest.raises(UserError, match="some: name=3; expected a text or None"):
        Some(name=3)


def test_what_an_override_leaves_unread_of_a_configuration_goes_back_to_its_default():
    """smollm2_text has a loss of hidden states; KL alone, or a stored signal, takes one option that switches it off."""
    given = ["--config", "smollm2_text", "--objective.features.hidden-weight", "0", "--signal.kind", "stored"]
    _, config = cli.parse_config("", given)
    assert config.objective.features == FeatureConfig()
    assert from_dict(TextConfig, to_dict(config)) == config
    with pytest.raises(UserError, match="is read only with"):
        FeatureConfig(hidden_loss="cosine")
    with pytest.raises(SystemExit, match="2"):
        cli.parse_config("", [*given, "--objective.features.average-heads"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import distill\n\ndef get_config():\n    return distill.TrainingConfig(stepz=3)\n",
            "line 4: TypeError: .*stepz",
        ),
        ("import distill_nowhere\n", "line 1: ModuleNotFoundError: .*distill_nowhere"),
        ("def get_config(:\n    pass\n", "SyntaxError: .*line 1"),
        ("import distill\n\ndef get_config():\n    return distill.TrainingConfig(steps=0)\n", "^training: steps=0"),
    ],
)
def test_a_mistake_in_the_users_own_file_is_the_users(text, message, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", str(tmp_path / "mine.py")):
        with pytest.raises(UserError, match=message):
            load_config(name)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("smollm2_text", ["--objective.features.hidden-weight", "0"]),
        ("smollm2_text", ["--data.heldout-source", "b.txt"]),
        ("smollm2_text", ["--student.source", "a/b"]),
        ("minilm", ["--features.relation-weight", "0"]),
    ],
)
def test_what_an_override_turns_off_takes_its_hyperparameters_along(name, overrides):
    """The user has not asked for them: the shipped configuration says them."""
    cli.parse_config("", ["--config", name, *overrides])


def test_a_hyperparameter_that_an_override_says_is_still_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse_config("", ["--config", "smollm2_text", "--objective.features.relation-heads", "2"])
    assert ended.value.code == 2 and "is read only with" in " ".join(capsys.readouterr().err.split())


def test_a_soft_term_that_begins_at_0_and_grows_is_one():
    """Its weight follows a schedule."""
    objective = ObjectiveConfig(kd_weight=0.0, final_kd_weight=1.0, schedule_steps=10, task_weight=1.0)
    assert TextConfig(objective=objective).objective == objective
    with pytest.raises(UserError, match="no unbiased estimate from draws"):
        wrong = dataclasses.replace(objective, divergence="reverse_kl")
        TextConfig(objective=wrong, signal=SignalConfig("stored", "sampled"))
