"""What a person sees: lines where there is no terminal, bars where there is one."""

from rich.console import Console

from distill import progress


def test_lines_say_only_what_is_known(capsys):
    with progress.Progress("student", 4) as shown:
        shown.evaluated(0, {"kl": 1.5, "nll": 3.0, "agreement": 0.4})
        shown.update(2, loss=0.25, tokens_per_second=1234.4)
        shown.evaluated(2, {"exact_match": 0.5})
        shown.update(4, notes="1 step skipped")
        shown.evaluated(4, {})
    assert capsys.readouterr().out.splitlines() == [
        "student 0/4  kl 1.5000  nll 3.0000",
        "student 2/4  loss 0.2500  exact match 50.0%  1,234 tokens/s",
        "student 4/4  loss 0.2500  1,234 tokens/s  1 step skipped",
    ]


def test_a_bar_of_loading_moves_on_a_terminal_only(capsys, monkeypatch):
    with progress.loading("weights", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "Console", lambda **options: Console(**options, force_terminal=True, width=80))
    with progress.loading("weights", 10) as advance:
        advance(5)
    out, shown = capsys.readouterr()
    assert out == "" and "loading weights" in shown and "0%" in shown
