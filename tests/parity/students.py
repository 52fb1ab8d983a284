"""A distilled student opened by transformers has our logits and tokens.

python -m pytest -n 0 tests/parity/students.py -W default
STUDENT=runs/smollm2_text/student_hf python -m pytest -n 0 tests/parity/students.py -W default
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_text_experiment import config, folder  # noqa: F401 - fixtures

import distill
from distill.experiments import runner
from distill.tokenizer import TextTokenizer

TEXT = "the cat sat on a mat and saw that the dog ran to it while no one was at home."


@pytest.fixture(scope="module")
def student(request, tmp_path_factory) -> Path:
    """Folder of a given student, or of one that is distilled here in seconds."""
    if "STUDENT" in os.environ:
        return Path(os.environ["STUDENT"])
    run = tmp_path_factory.mktemp("student")
    runner.run_experiment(request.getfixturevalue("config"), run)
    return run / "student_hf"


def test_transformers_opens_the_student(student):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    model, params = distill.load(student)
    tokenizer, auto = TextTokenizer.from_folder(student), AutoTokenizer.from_pretrained(student)
    ids = tokenizer.encode(TEXT)
    assert auto(TEXT, add_special_tokens=False)["input_ids"] == ids and auto.decode(ids) == TEXT
    assert auto.eos_token_id == tokenizer.eos_id
    tokens = np.asarray([ids], np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.logits(params, tokens)), want, atol=1e-4)
