"""Exit codes and messages of the commands."""

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distill import cli
from distill.errors import MissingFile, UserError
from distill.optim import OptimizerConfig
from distill.train import Stopped


def raised_by(function) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    ("cause", "code", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=0.0), 2, "error: optimizer: learning_rate=0.0; expected"),
        (
            lambda: Path("/nowhere/at/all").read_text(),
            2,
            "error: [Errno 2] No such file or directory: '/nowhere/at/all'",
        ),
        (lambda: jax.vmap(jnp.add)(jnp.ones(2), jnp.ones(3)), 1, "error: ValueError: vmap got inconsistent sizes"),
        (lambda: int("x"), 1, "error: ValueError: invalid literal"),
        (lambda: {}["x"], 1, "error: KeyError: 'x' (--debug shows where)"),
    ],
)
def test_only_what_is_the_users_has_code_2(cause, code, message):
    """A ValueError of JAX or of Python is a fault of the library, not of what was given."""
    got = cli.explain(raised_by(cause))
    assert got[0] == code and got[1].startswith(message)


def test_the_users_errors_are_also_those_of_python():
    assert issubclass(UserError, ValueError) and issubclass(MissingFile, FileNotFoundError | UserError)


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (Stopped("stopped", signal.SIGINT), 130), (Stopped("stopped", signal.SIGTERM), 0)],
)
def test_an_interrupted_command_does_not_end_as_a_finished_one(error, code, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setattr("sys.argv", ["distill.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run_main(main)
    assert ended.value.code == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and shown.count("\n") == 1
