"""The report: its numbers are those of the run folder, its page is self-contained, its errors name a remedy."""

import ast
import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from distill.reports import addition as report
from distill.reports import page as pages
from distill.reports import sentences as report_sentences
from distill.reports import text as report_text
from distill.reports.page import series

SYMBOLS = [*"0123456789+=", "<eos>", "<pad>"]
FIGURES = ("curves", "parameters", "carries", "soft_targets", "calibration")


# ---- a run folder as written by scripts/distill.py and scripts/evaluate.py


def softmax(logits):
    return (np.exp(logits) / np.exp(logits).sum()).tolist()


def scores(parameters, flops, carries, nll, ece, latency, throughput, **more):
    counts, rng = (1310, 2440, 1250), np.random.default_rng(parameters)
    confidence = np.linspace(0.15, 0.995, 10)
    accuracy = np.clip(confidence + rng.normal(0, 0.02, 10) - 3 * ece * (1 - confidence), 0, 1)
    bins = zip(confidence, accuracy, np.geomspace(20, 12000, 10).round(), strict=True)
    groups = enumerate(zip(carries, counts, strict=True))
    return {
        **{"parameters": parameters, "flops_per_token": flops, "examples": sum(counts), "nll": nll},
        "exact_match": float(np.dot(carries, counts) / sum(counts)),
        "exact_match_by_carries": {str(i): {"exact_match": match, "count": count} for i, (match, count) in groups},
        "calibration": {
            "ece": ece,
            "bins": [dict(zip(("confidence", "accuracy", "count"), b, strict=True)) for b in bins],
        },
        **{"latency_seconds": latency, "tokens_per_second": throughput, **more},
    }


def soft_targets():
    teacher = np.array([-3, -2.5, 5.1, 12, 4.2, -1, -2, -3.5, -4, -2.8, -9, -9, -8.5, -11.0])
    student = teacher * 0.9 + np.array([0.3, -0.2, 0.1, 0, 0.2, 0.4, -0.3, 0.1, 0, 0.2, 0, 0.5, 0, 0])
    baseline = np.array([1.0, 2.2, 1.4, 2.0, 0.7, 1.9, 2.4, 1.1, 0.3, 1.6, -6, -6, -5, -8])
    return {
        **{"prompt": "47+85=", "written": "231", "position": 1, "truth": "3", "symbols": SYMBOLS, "temperature": 4.0},
        **{"teacher": softmax(teacher), "teacher_softened": softmax(teacher / 4)},
        **{"student": softmax(student), "baseline": softmax(baseline)},
    }


def evaluation():
    chosen = {"labels": 100, "runs": 12, "chosen": {"learning_rate": 0.01, "weight_decay": 1.0, "steps": 1500}}
    near, far = {"agreement": 0.9997, "kl": 0.0013}, {"agreement": 0.4312, "kl": 2.274}
    costs = {
        "teacher training": (4.61e11, 9.6, 17.4, 174.0),
        "student distillation": (5.52e11, 13.1, 21.0, 210.0),
        "baseline sweep (12 runs)": (1.83e12, 88.2, 141.0, 1410.0),
        "evaluation": (2.3e10, 3.2, 4.9, 49.0),
    }
    columns = ("what", "flops", "seconds", "cpu_seconds", "joules")
    rows = [dict(zip(columns, (what, *cost), strict=True)) for what, cost in costs.items()]
    return {
        "teacher": scores(100864, 199936, (1.0, 1.0, 0.9992), 0.0009, 0.0004, 0.0113, 8150.0),
        "student": scores(6864, 13216, (1.0, 0.9996, 0.9984), 0.0021, 0.0011, 0.0041, 31200.0, **near),
        "baseline": scores(6864, 13216, (0.0412, 0.0131, 0.0032), 2.31, 0.4127, 0.0042, 30900.0, **far, **chosen),
        "soft_targets": soft_targets(),
        "ledger": {"rows": rows, "watts_per_core": 10.0, "uncertainty": 0.4},
    }


def arms():
    rng = np.random.default_rng(0)
    plan = [("unlabelled", None, 1.0), ("skyline", 5000, 1.0), ("permuted_teacher", None, 0.01)]
    plan += [("independent_teacher", None, 0.99)]
    plan += [
        (arm, n, match) for arm in ("alone", "same_prompts") for n, match in ((100, 0.02), (300, 0.62), (600, 0.9))
    ]
    rows = []
    for student, parameters in (("15x", 6864), ("29x", 3440), ("71x", 1428)):
        for arm, labels, match in plan:
            seeds = np.clip(rng.normal(match, 0.1 * match * (1.02 - match), 5), 0, 1)
            half = 1.96 * seeds.std() / 5**0.5
            given = {
                "student": student,
                "parameters": parameters,
                "arm": arm,
                "labels": labels,
                "seeds": seeds.tolist(),
            }
            found = {"mean": seeds.mean(), "interval": [seeds.mean() - half, seeds.mean() + half], "worst": seeds.min()}
            other = {"gap_closed": 0.5, "agreement": 0.9, "kl": None, "runs": 12, "cpu_seconds": 140.0, "flops": 1e12}
            rows.append(given | found | other)
    teacher = {"parameters": 100864, "seeds": [1.0, 1.0, 0.9998, 1.0, 1.0]}
    return {"teacher": teacher, "rows": rows, "sweep": {"runs": 108, "cpu_seconds": 1260.0}}


def records(steps, speed, last, seed):
    rng = np.random.default_rng(seed)
    for step in range(10, steps + 1, 10):
        loss = float(2.6 * math.exp(-step / speed) + 2e-3) * math.exp(rng.normal(0, 0.15))
        yield {"kind": "train", "step": step, "loss": loss, "seconds": step * 0.01, "tokens_per_second": 9e4}
        if step % 50 == 0:
            match = last / (1 + math.exp(-(step - 3 * speed) / (0.4 * speed)))
            yield {"kind": "eval", "step": step, "exact_match": match, "seconds": step * 0.01}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path, value):
    write(path, json.dumps(value))


def write_lines(path, lines):
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder):
    result = evaluation()
    write_json(folder / "config.json", {"name": "addition", "student": {"width": 16}, "objective": {"forward_kl": 1.0}})
    write_lines(folder / "metrics.jsonl", records(1500, 130, 0.9996, 0))
    write_lines(folder / "teacher" / "metrics.jsonl", records(500, 60, 0.9998, 1))
    write_lines(folder / "baseline" / "metrics.jsonl", records(1500, 300, 0.018, 2))
    write_json(folder / "evaluation.json", result)
    summary = {m: {key: result[m][key] for key in ("parameters", "exact_match")} for m in report.MODELS}
    write_json(folder / "summary.json", {**summary, "gap_closed": 0.9994, "agreement": 0.9997, "seconds": 118.0})
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def change(path, *edits):
    value = json.loads(path.read_text(encoding="utf-8"))
    for edit in edits:
        edit(value)
    write_json(path, value)


def rescore(run, *edits):
    change(run / "evaluation.json", *edits)


def page(*runs):
    return report.write_report(runs).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Parser that collects all attributes and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.attributes, self.images, self.headers, self.texts = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.texts += [] if tag == "span" else [" "]
        self.images += [dict(attrs)] if tag == "img" else []
        self.headers += [dict(attrs)] if tag == "th" else []

    def handle_data(self, data):
        self.texts += [] if self.lasttag == "style" else [data]

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


def text(*runs):
    return Reader(page(*runs)).text


@pytest.fixture
def undrawn(monkeypatch):
    """Skips drawing; for tests of the text of the page."""
    monkeypatch.setattr(report, "_draw_figures", lambda runs: dict.fromkeys(FIGURES, "data:"))


def refused(run, error, message):
    with pytest.raises(error, match=message):
        report.write_report([run])


def test_the_page_is_self_contained(run):
    write_json(run / "arms.json", arms())
    html = page(run)
    read = Reader(html)
    for part in ("http:", "https:", "<script", "@import", "url(", "javascript:"):
        assert part not in html
    addresses = [value for name, value in read.attributes if name in ("src", "href", "srcset", "action", "poster")]
    assert len(addresses) >= 7
    assert all(address.startswith("data:") for address in addresses)
    assert not [name for name, _ in read.attributes if name.startswith("on")]


def test_figures_are_files_and_part_of_the_page_with_alt_texts(run):
    write_json(run / "arms.json", arms())
    html = page(run)
    for name in (*FIGURES, "arms"):
        assert base64.b64encode((run / f"{name}.png").read_bytes()).decode() in html
    assert all(len(image["alt"]) > 40 for image in Reader(html).images)


def test_the_page_is_accessible_and_responsive(run):
    html = page(run)
    headers = Reader(html).headers
    assert headers and all("scope" in header for header in headers)
    assert '<html lang="en">' in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html


def test_same_run_gives_the_same_bytes_whatever_the_matplotlibrc(tmp_path):
    import matplotlib

    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    report.write_report([first])
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        report.write_report([second])
    for name in ("report.html", *(f"{name}.png" for name in FIGURES)):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_page_describes_the_first_run_and_compares_the_others(run, tmp_path):
    other = write_run(tmp_path / "other")
    change(other / "config.json", lambda c: c.update(name="second try"))
    change(other / "evaluation.json", lambda e: e["student"].update(parameters=3440, exact_match=0.4321))
    alone, both = text(run), text(run, other)
    assert "second try" not in alone
    assert "second try" in both and "3,440" in both and "43.21 %" in both
    assert not (other / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_verdict_and_cards_follow_the_scores(run):
    cards = re.findall(r'class="value">(.*?)</dd>', page(run))
    assert cards == ["99.98 %", "99.94 %", "1.80 %", "99.9 %", "99.97 %"]
    rescore(run, lambda e: e["teacher"].update(exact_match=0.8), lambda e: e["student"].update(exact_match=0.6))
    assert "A student with 14.7× fewer parameters keeps 75.0 % of its teacher’s exact match; " in text(run)
    assert "the same student trained alone on 100 labels reaches 1.8 %." in text(run)
    rescore(run, lambda e: e["teacher"].update(exact_match=0.0))
    assert "is not known" in text(run)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("model", report.MODELS)
@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("exact_match", 0.32123, "32.12 %"),
        ("parameters", 54321, "54,321"),
        ("flops_per_token", 9.87e8, "9.87 × 10⁸"),
        ("nll", 0.3217, "0.322"),
        ("latency_seconds", 0.00777, "7.77"),
        ("tokens_per_second", 7654321.0, "7,654,321"),
    ],
)
def test_a_number_of_the_page_is_the_number_of_the_file(run, model, key, value, shown):
    assert shown not in text(run)
    rescore(run, lambda e: e[model].update({key: value}))
    assert shown in text(run)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (lambda e: e["student"].update(agreement=0.8765), "87.65 %"),
        (lambda e: e["student"].update(kl=0.04321), "0.0432"),
        (lambda e: e["student"]["calibration"].update(ece=0.0765), "7.65 %"),
        (lambda e: e["student"]["exact_match_by_carries"]["2"].update(exact_match=0.5439), "54.4 %"),
        (lambda e: e["student"]["exact_match_by_carries"]["1"].update(count=7777), "7,777"),
        (lambda e: e["baseline"].update(labels=250), "alone on 250 labels"),
        (lambda e: e["baseline"].update(runs=77), "the best of 77 runs"),
        (lambda e: e["baseline"]["chosen"].update(weight_decay=0.37), "weight decay 0.37"),
        (lambda e: e["ledger"]["rows"][2].update(flops=7.7e13), "7.70 × 10¹³"),
        (lambda e: e["ledger"].update(watts_per_core=13.0), "13 W per core"),
        (lambda e: e["ledger"].update(uncertainty=0.55), "±55 %"),
        (lambda e: e["soft_targets"].update(temperature=8.0), "with T = 8"),
    ],
)
def test_the_other_numbers_are_those_of_the_file(run, edit, shown):
    assert shown not in text(run)
    rescore(run, edit)
    assert shown in text(run)


@pytest.mark.usefixtures("undrawn")
def test_the_ledger_has_totals(run):
    read = text(run)
    assert " Total 2.87 × 10¹² 114 184 1,843 " in read and " 76.5 % " in read  # the sweep's share of the energy
    rescore(run, lambda e: e["ledger"]["rows"][0].pop("joules"), lambda e: e["ledger"]["rows"][1].update(flops=None))
    assert "≥ 1,669" in text(run) and "≥ 2.31 × 10¹²" in text(run)


@pytest.mark.usefixtures("undrawn")
def test_gap_closed_is_read_from_the_summary_and_differences_are_noted(run):
    assert "summary.json has" not in text(run)
    change(run / "summary.json", lambda s: s.update(gap_closed=0.6543), lambda s: s["student"].update(exact_match=0.5))
    assert "65.4 %" in text(run)
    assert "summary.json has 50.00 % exact match for the student" in text(run)


def test_the_later_record_of_a_step_counts():
    logged = ((10, 3.0), (20, 2.0), (30, 9.0), (20, 1.0))
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in logged]
    steps, losses = series([*lines, {"kind": "eval", "step": 20, "exact_match": 0.5}], "train", "loss")
    assert steps.tolist() == [10, 20, 30] and losses.tolist() == [3.0, 1.0, 9.0]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_follow_the_numbers(run, name):
    report.write_report([run])
    before = (run / f"{name}.png").read_bytes()

    def edit(e):
        e["student"]["exact_match"] = 0.5
        e["student"]["exact_match_by_carries"]["1"]["exact_match"] = 0.5
        e["student"]["calibration"]["bins"][3]["accuracy"] = 0.9
        e["soft_targets"]["student"] = e["soft_targets"]["teacher_softened"]

    rescore(run, edit)
    write_lines(run / "metrics.jsonl", records(1500, 200, 0.5, 0))
    report.write_report([run])
    assert (run / f"{name}.png").read_bytes() != before


@pytest.mark.usefixtures("undrawn")
def test_the_caption_of_the_soft_targets_states_the_numbers(run):
    read, soft = text(run), soft_targets()
    assert "After the prompt 47+85= and the digits 2 (answers are written least" in read
    assert f"The teacher gives it {100 * soft['teacher'][3]:.1f} %; the student" in read
    assert "Its most likely wrong digit is 2, the result of a carry error (" in read
    assert f"{soft['teacher'][2] / soft['teacher'][8]:,.0f} times as likely as 8" in read
    assert f"softened with T = 4 its probability is {100 * soft['teacher_softened'][2]:.1f} %" in read
    change(run / "config.json", lambda c: c.update(data={"reverse": False}))  # other digits have another carry
    assert "carry error" not in text(run) and "least significant" not in text(run)


@pytest.mark.usefixtures("undrawn")
def test_the_caption_of_the_soft_targets_follows_changed_numbers(run):
    def edit(e):
        e["soft_targets"]["teacher"][3:6] = [0.1, 0.0, 0.9]
        e["soft_targets"]["student"] = e["soft_targets"]["teacher"]
        e["soft_targets"]["baseline"] = [1 - p for p in e["soft_targets"]["teacher"]]

    rescore(run, edit)
    read = text(run)
    assert "gives it 10.0 %, and is wrong here" in read
    assert "wrong digit is 5 (90.0 %" in read  # and 5 is no carry error
    assert "1.00 for the student and -1.00 for the baseline" in read


@pytest.mark.parametrize(
    ("prompt", "position", "truth", "slip"),
    [("47+85=", 1, "3", "2"), ("41+32=", 1, "7", "8"), ("47+85=", 2, "1", "0"), ("hello", 0, "3", None)],
)
def test_the_digit_of_a_carry_error(prompt, position, truth, slip):
    assert report._carry_slip({"prompt": prompt, "position": position, "truth": truth}) == slip


def test_rank_correlation_is_spearmans():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert report._rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert report._rank_correlation(a, -a) == pytest.approx(-1)
    assert report._rank_correlation(a, np.array([1.0, 2.0, 2.0, 3.0])) == pytest.approx(0.9486833)  # scipy's spearmanr
    assert math.isnan(report._rank_correlation(a, np.ones(4)))
    assert math.isnan(report._rank_correlation(a, np.array([1, np.nan, 2, 3])))


def test_a_run_without_a_baseline_has_a_page(run):
    rescore(run, lambda e: e.pop("baseline"), lambda e: e["soft_targets"].pop("baseline"))
    (run / "baseline" / "metrics.jsonl").unlink()
    (run / "summary.json").unlink()
    read = text(run)
    assert "keeps 99.96 % of its teacher’s exact match." in read
    assert "baseline" not in read.split("baseline sweep (12 runs)")[0]
    assert "gap closed" not in read


@pytest.mark.parametrize(
    ("remove", "heading", "image"),
    [
        (lambda e: e.pop("soft_targets"), "Soft targets", "soft_targets"),
        (lambda e: e.pop("ledger"), "Cost", None),
        (lambda e: e["student"].pop("calibration"), "Calibration", "calibration"),
        (lambda e: e["student"].pop("exact_match_by_carries"), "number of carries", "carries"),
    ],
)
def test_sections_without_data_are_left_out(run, remove, heading, image):
    assert heading in text(run)
    [old.unlink() for old in run.glob("*.png")]
    rescore(run, remove)
    assert heading not in text(run)
    assert image is None or not (run / f"{image}.png").exists()


def test_arms_are_shown_when_they_were_run(run):
    assert "Arms of the protocol" not in text(run)
    write_json(run / "arms.json", arms())
    change(run / "arms.json", lambda a: a["rows"][0].update(worst=0.1234, interval=[0.0511, 0.0722]))
    read = text(run)
    assert "Arms of the protocol" in read and "12.34 %" in read and "5.1 to 7.2 %" in read
    for name, _, _ in report.ARMS.values():
        assert read.count(name) in (3, 9)  # once for each student, or for each number of labels


def test_numbers_that_are_not_finite_are_shown_as_a_dash(run):
    def edit(e):
        e["student"].update(exact_match=math.nan, agreement=math.inf, kl=None, nll=math.nan)
        e["student"]["calibration"].update(ece=math.nan)
        e["student"]["calibration"]["bins"][0].update(accuracy=math.nan)
        e["student"]["exact_match_by_carries"]["1"].update(exact_match=None)
        e["soft_targets"]["student"] = [math.nan] * len(SYMBOLS)
        e["soft_targets"]["teacher"][8] = 0.0
        e["ledger"]["rows"][0].update(joules=math.nan)

    rescore(run, edit)
    losses = [{"kind": "train", "step": 1, "loss": math.nan}, {"kind": "eval", "step": 1, "exact_match": None}]
    write_lines(run / "metrics.jsonl", losses)
    write_lines(run / "teacher" / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": -1.0}])
    (run / "baseline" / "metrics.jsonl").unlink()
    read = text(run)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", read, re.IGNORECASE)
    assert "teacher’s exact match that a student" in read and "keeps is not known" in read


def test_content_of_the_files_is_escaped(run):
    bad = "<script>alert('x')</script>"
    change(run / "config.json", lambda c: c.update(name=bad, note={bad: '"&<'}))
    write_json(run / "arms.json", arms())
    change(run / "arms.json", lambda a: a["rows"][0].update(student=bad))
    rescore(run, lambda e: e["ledger"]["rows"][0].update(what=bad), lambda e: e["soft_targets"].update(prompt=bad))
    html = page(run)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 6
    assert bad in Reader(html).text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evaluation.json", r"does not exist; run scripts/evaluate\.py --run .*run first"),
        ("config.json", r"does not exist; run scripts/distill\.py --run .*run first"),
        ("metrics.jsonl", r"is missing or empty; run scripts/distill\.py --run .*run first"),
    ],
)
def test_a_missing_file_is_an_error_with_its_remedy(run, name, message):
    (run / name).unlink()
    refused(run, FileNotFoundError, f"{name} {message}")


def test_a_missing_folder_and_no_run_are_errors(tmp_path):
    refused(tmp_path / "none", FileNotFoundError, r"none does not exist; run scripts/distill\.py --run .*none first")
    with pytest.raises(ValueError, match="no run folder was given"):
        report.write_report([])


@pytest.mark.parametrize("scores", [None, [1], {}, {"parameters": 5}, {"parameters": 0, "exact_match": 1.0}])
def test_missing_or_non_numeric_scores_are_errors(run, scores):
    rescore(run, lambda e: e.update(student=scores))
    refused(run, ValueError, r"evaluation\.json: expected 'student' to hold .*; run scripts/evaluate\.py --run")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("soft_targets", lambda e: e["soft_targets"]["student"].pop()),
        ("soft_targets", lambda e: e["soft_targets"].pop("truth")),
        ("soft_targets", lambda e: e["soft_targets"].update(truth="?")),
        ("calibration", lambda e: e["student"]["calibration"]["bins"][0].pop("confidence")),
        ("carries", lambda e: e["student"].update(exact_match_by_carries=[1, 2])),
    ],
)
def test_broken_data_of_a_figure_are_an_error_with_its_file(run, name, edit):
    rescore(run, edit)
    refused(run, ValueError, rf"evaluation\.json lacks what the figure '{name}' shows .* scripts/evaluate\.py")


@pytest.mark.parametrize(("content", "complaint"), [("{", "is not JSON"), ("[1]", "holds a list, expected a JSON obj")])
def test_invalid_json_is_an_error(run, content, complaint):
    (run / "evaluation.json").write_text(content)
    refused(run, ValueError, rf"evaluation\.json {complaint}.*; run scripts/evaluate")


def test_broken_metrics_are_named_by_line_and_a_truncated_last_line_is_ignored(run):
    lines = (run / "metrics.jsonl").read_text()
    whole = page(run)
    (run / "metrics.jsonl").write_text(lines + '{"kind": "tra')
    assert page(run) == whole
    (run / "metrics.jsonl").write_text("oops\n" + lines)
    refused(run, ValueError, r"metrics\.jsonl, line 1: expected a JSON object, got 'oops'")


@pytest.mark.parametrize("module", [report, pages, report_text, report_sentences], ids=lambda module: module.__name__)
def test_the_report_imports_neither_jax_nor_pyplot(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name if isinstance(node, ast.Import) else node.module for node in imports for alias in node.names]
    own = ("distill.reports", "distill.errors")  # the latter imports nothing but Python's own modules
    others = {name.split(".")[0] for name in names if not name.startswith(own)}
    assert others <= {*sys.stdlib_module_names, "numpy", "matplotlib", "jinja2"}
    assert "matplotlib.pyplot" not in names
    assert "matplotlib" not in "".join(ast.unparse(node) for node in tree.body if node in imports)  # only to draw
