"""metrics.jsonl: lines of a run, cut at a resume, whatever interrupts it."""

import json
import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from distill import metrics
from distill.metrics import Writer, read_metrics

LINES = st.lists(st.tuples(st.sampled_from(["train", "eval"]), st.integers(0, 9)), max_size=12)


class Killed(BaseException):
    """In place of a SIGKILL."""


def written(run: Path, lines) -> list[dict]:
    records = [{"kind": kind, "step": step, "seconds": float(i)} for i, (kind, step) in enumerate(lines)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(LINES, st.integers(1, 9), st.integers(0, 12))
def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path_factory, lines, step, cut):
    """Also where a kill had cut the last line short."""
    run = tmp_path_factory.mktemp("run")
    records = written(run, lines)
    with open(run / "metrics.jsonl", "rb+") as file:
        file.truncate(max(os.path.getsize(file.name) - cut, 0))
    readable = read_metrics(run)
    assert readable == records[: len(readable)] and len(readable) >= len(records) - 1
    writer = Writer(run, step)
    kept = [record for record in readable if record["step"] <= step]
    assert writer.seconds == max((record["seconds"] for record in kept), default=0.0)
    writer.write("train", step, {"loss": 1.0})
    writer.close()
    assert read_metrics(run) == [*kept, {"kind": "train", "step": step, "loss": 1.0}]


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(LINES, st.integers(1, 9), st.sampled_from(["open", "write", "replace"]))
def test_a_kill_during_a_resume_loses_no_line(tmp_path_factory, lines, step, place):
    """Killed before the new file is opened, half-way through its text, or before it takes the old one's place."""
    run = tmp_path_factory.mktemp("run")
    written(run, lines)
    before = (run / "metrics.jsonl").read_text()

    def replaced(*_):
        raise Killed

    def wrote(path: Path, text: str, *_):
        if place == "write":
            path.write_bytes(text.encode()[: len(text) // 2])
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        if place == "replace":
            patch.setattr(metrics.os, "replace", replaced)
        else:
            patch.setattr(Path, "write_text", wrote)
        with pytest.raises(Killed):
            Writer(run, step)
    assert (run / "metrics.jsonl").read_text() == before
    Writer(run, step).close()
    assert [record["step"] for record in read_metrics(run)] == [k for _, k in lines if k <= step]


def test_a_run_that_begins_anew_has_no_old_lines(tmp_path):
    written(tmp_path, [("train", 3), ("eval", 5)])
    writer = Writer(tmp_path, 0)
    assert writer.seconds == 0.0 and read_metrics(tmp_path) == []
    writer.close()
