"""Progress: lines without a terminal, bars with one."""

from rich.console import Console

from distill import progress


def test_lines_show_only_known_values(capsys):
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


def test_a_loading_bar_is_drawn_only_on_a_terminal(capsys, monkeypatch):
    with progress.loading("weights", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "Console", lambda **options: Console(**options, force_terminal=True, width=80))
    with progress.loading("weights", 10) as advance:
        advance(5)
    out, shown = capsys.readouterr()
    assert out == "" and "loading weights" in shown and "0%" in shown
