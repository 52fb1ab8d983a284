"""The page of a distillation on text, from a folder written here: its figure whole, its texts as they were written."""

import json

import pytest

from distill import report_text

WRITTEN = ["def f(x):\n    return x < 1", "the end"]
ROW = {"kl": 0.5, "nll": 3.25, "agreement": 0.6, "steps": 100, "training_seconds": 800.0, "written": WRITTEN}


@pytest.fixture
def run(tmp_path):
    """A run folder as ``text_experiment.py`` leaves it."""
    names = ("teacher", "student", "equal_tokens", "equal_time", "start")
    evaluation = {name: ROW for name in names} | {"verdict": ["as good"], "prompts": ["import os\n", "Once"]}
    evaluation |= {"heldout": {"tokens": 9}, "ledger": {"rows": [], "watts_per_core": 4.0, "uncertainty": 0.5}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "config.json").write_text(json.dumps({"kind": "text", "name": "smollm2_text"}))
    for arm in ("", "equal_tokens", "equal_time"):
        (tmp_path / arm).mkdir(exist_ok=True)
        records = [{"kind": "eval", "step": n, "kl": 2 - n / 100, "nll": 4 - n / 100} for n in (0, 50, 100)]
        (tmp_path / arm / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_nothing_of_the_figure_is_cut_off(run, monkeypatch):
    from matplotlib.figure import Figure

    kept, drawn = Figure.savefig, []

    def savefig(figure, *args, **options):
        kept(figure, *args, **options)
        drawn.append((figure.get_tightbbox(), figure.bbox_inches, [len(axes.lines) for axes in figure.axes]))

    monkeypatch.setattr(Figure, "savefig", savefig)
    report_text.write_report([run])
    ((box, whole, lines),) = drawn
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert lines == [4, 4]  # three arms, and the teacher


def test_what_every_model_writes_is_shown_as_it_is(run):
    page = report_text.write_report([run]).read_text()
    assert page.count('<td class="said"><pre>def f(x):\n    return x &lt; 1</pre></td>') == 5
    assert '<th scope="col" class="said"><pre>import os\n</pre></th>' in page
    assert ".said { width: 100%; text-align: left; white-space: normal;" in page
