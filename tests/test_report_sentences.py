"""The page of a sentence encoder: numbers of the files, self-contained, errors that name what is missing."""

import base64
import json
import re

import pytest

from distill.experiments.kinds import report_in
from distill.reports import page
from distill.reports import sentences as report_sentences

SCORES = {"spearman": 0.7447, "pearson": 0.7821, "nearest": 0.401, "cosine": 0.8169}
SIZE = {"layers": 3, "parameters": 17389824}


def write_run(folder, name="minilm", **changes):
    """A run folder as written by a sentence experiment."""
    evaluation = {
        "teacher": {"layers": 6, "parameters": 22713216},
        "untrained": SIZE | SCORES | {"spearman": 0.3939},
        "student": SIZE | SCORES,
        "control": SIZE | SCORES | {"spearman": 0.1375, "nearest": None},
        "cpu_seconds": 236.4,
        "held_out": 1000,
        "examples": [
            {"sentence": "a <b>?", "teacher": "one & all", "untrained": "two", "student": "three", "control": "four"}
        ],
    }
    for place, start in (("", 0.39), ("random", 0.0)):
        (folder / place).mkdir(parents=True)
        records = [{"kind": "eval", "step": n, "spearman": start + n / 300, "cosine": 0.5} for n in (0, 50, 100)]
        (folder / place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "evaluation.json").write_text(json.dumps(evaluation | changes))
    (folder / "config.json").write_text(json.dumps({"kind": "sentences", "name": name}))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def rows_of(page):
    """The cells of every row of the first table."""
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_the_table_holds_the_numbers_of_the_files(run, tmp_path):
    other = write_run(tmp_path / "other", "second try", student=SIZE | SCORES | {"cosine": 0.25})
    assert report_in(run) is report_sentences
    path = report_sentences.write_report([run, other])
    assert path == run / "report.html"
    rows = rows_of(path.read_text())
    assert rows[:4] == [
        ["teacher", "6", "22,713,216", "–", "–", "–", "–"],
        ["student, untrained", "3", "17,389,824", "0.394", "0.782", "40.1 %", "0.817"],
        ["student", "3", "17,389,824", "0.745", "0.782", "40.1 %", "0.817"],
        ["control, from random weights", "3", "17,389,824", "0.138", "0.782", "–", "0.817"],
    ]
    assert rows[6] == ["second try: student", "3", "17,389,824", "0.745", "0.782", "40.1 %", "0.25"] and len(rows) == 8


def test_the_page_is_self_contained_and_escapes_its_content(run):
    page = report_sentences.write_report([run]).read_text()
    assert base64.b64encode((run / "curves.png").read_bytes()).decode() in page
    assert not [part for part in ("http:", "https:", "<script", "@import", "url(") if part in page]
    assert "a &lt;b&gt;?" in page and "one &amp; all" in page and "<b>" not in page
    assert all("scope=" in header for header in re.findall(r"<th\b[^>]*>", page.split("</style>")[1]))
    verdict = page[page.index('class="verdict"') : page.index("</header>")]
    parts = ("3 of 6 layers", "1,000", "correlation of 0.745", "student has 0.394", "reaches 0.138")
    assert all(part in verdict for part in parts)


def test_curves_are_those_of_student_and_control(run, monkeypatch):
    drawn, kept = {}, page.legend

    def legend(axes, columns):
        drawn.update({line.get_label(): line.get_ydata().tolist() for line in axes.lines})
        kept(axes, columns)

    monkeypatch.setattr(page, "legend", legend)
    report_sentences.write_report([run])
    want = {"student": 0.39, "control, from random weights": 0.0}
    assert drawn == {name: pytest.approx([start + n / 300 for n in (0, 50, 100)]) for name, start in want.items()}


def test_runs_without_examples_have_a_page(tmp_path):
    run = write_run(tmp_path / "run", examples=None, cpu_seconds=None)
    page = report_sentences.write_report([run]).read_text()
    assert "Nearest neighbours" not in page and "CPU-seconds" not in page


def test_missing_files_and_scores_are_named(run):
    for name, values in (("control", {"control": None}), ("teacher", {"teacher": 3})):
        broken = write_run(run.parent / name, **values)
        with pytest.raises(ValueError, match=f"no scores of '{name}'; run scripts/evaluate.py --run"):
            report_sentences.write_report([broken])
    (run / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; run .* --config minilm"):
        report_sentences.write_report([run])
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json does not exist; run scripts/evaluate\.py"):
        report_sentences.write_report([run / "nowhere"])
