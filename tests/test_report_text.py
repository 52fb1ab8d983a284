"""The page of a distillation on text: its figure is complete and its texts are unchanged."""

import json
from typing import get_args, get_type_hints

import pytest

from distill.data.text import TextDataConfig
from distill.reports import text as report_text

WRITTEN = ["def f(x):\n    return x < 1", "the end"]
ROW = {"kl": 0.5, "nll": 3.25, "agreement": 0.6, "steps": 100, "training_seconds": 800.0, "written": WRITTEN}


TRAIN = {"documents": 60, "tokens": 1200, "cut": 7, "lost": 31, "empty": 2, "rows": 50, "counted": 1100, "fill": 0.96}


@pytest.fixture
def run(tmp_path):
    """A run folder as written by a text experiment."""
    names = ("teacher", "student", "equal_tokens", "equal_time", "start")
    evaluation = {name: ROW for name in names} | {"verdict": ["as good"], "prompts": ["import os\n", "Once"]}
    evaluation["text"] = {"train": TRAIN, "heldout": TRAIN}
    evaluation |= {"heldout": {"tokens": 9}, "ledger": {"rows": [], "watts_per_core": 4.0, "uncertainty": 0.5}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "config.json").write_text(json.dumps({"kind": "text", "data": {"overflow": "keep_end"}}))
    for arm in ("", "equal_tokens", "equal_time"):
        (tmp_path / arm).mkdir(exist_ok=True)
        records = [{"kind": "eval", "step": n, "kl": 2 - n / 100, "nll": 4 - n / 100} for n in (0, 50, 100)]
        (tmp_path / arm / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_no_part_of_the_figure_is_cut_off(run, monkeypatch):
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


def test_generated_texts_are_shown_unchanged(run):
    page = report_text.write_report([run]).read_text()
    assert page.count('<td class="prose"><pre>def f(x):\n    return x &lt; 1</pre></td>') == 5
    assert '<th scope="col" class="prose"><pre>import os\n</pre></th>' in page
    assert ".prose { width: 100%; text-align: left; white-space: normal;" in page


def test_the_page_states_which_side_of_long_documents_was_cut(run):
    page = report_text.write_report([run]).read_text()
    assert "1,200 tokens of 60 documents, packed into 50 rows that are 96.0 % full." in page
    assert (
        "7 documents are longer than a row: their end is kept, their start is cut off. 31 tokens were left out" in page
    )
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["text"]  # a run of a version that did not store it
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "longer than a row" not in report_text.write_report([run]).read_text()
    assert report_text.OVERFLOW.keys() == set(get_args(get_type_hints(TextDataConfig)["overflow"]))
