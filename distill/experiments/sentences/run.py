"""A sentence encoder distilled into one with fewer of its layers, judged by how alike they find held-out sentences.

    RUN/             the student: layers of the teacher, then trained
    RUN/student_hf/  the same, as ``distill.load(RUN)`` and transformers open it
    RUN/random/      the control: the same network from random weights, as many steps on the same batches
    RUN/evaluation.json, RUN/summary.json; of scripts/report.py: RUN/report.html

Nobody labels anything: the teacher's embeddings and relations are what is learnt.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import fetch, losses
from distill.batch import Batch
from distill.checkpoint import fingerprint, lock
from distill.config import to_dict, write_json
from distill.experiments.cost import restore
from distill.experiments.folder import configured, read_config
from distill.experiments.sentences.config import SentenceConfig
from distill.features import feature_terms, projector_shapes, with_projectors, without_projectors
from distill.models import Collect, EncoderConfig, Model, encoder
from distill.models.encoder import embed, keep_layers, pool
from distill.models.layers import layer_norm
from distill.shapes import Array, Params
from distill.term import Needs, Term, View
from distill.train import Task, fit
from distill.weights import STUDENT, load, save

HELD_OUT_DIALOGUES = 700
SHORTEST = 6
"""Tokens of the shortest sentence."""
EXAMPLES = 6
"""Held-out sentences whose nearest neighbours are written down."""
Sentences = tuple[np.ndarray, list[str]]
"""Ids ``[n, L]`` with 0 for padding, and the texts."""


def run_experiment(config: SentenceConfig, run: Path) -> dict[str, Any]:
    """Does what is not done yet; returns the summary."""
    with lock(run / ".experiment"), configured(run, config):
        teacher, params = _teacher(config)
        sides = sentences(config)
        begun = time.process_time()
        for folder, start in ((run, True), (run / "random", False)):
            trained = train(config, folder, teacher, params, sides["train"], sides["held_out"], from_teacher=start)
            if start:
                save(run / STUDENT, _student(config, teacher, params, True), trained, _folder(config))
        write_json(run / "cost.json", {"cpu_seconds": time.process_time() - begun})
        return _evaluate(config, run, teacher, params, sides["held_out"])


def _folder(config: SentenceConfig) -> Path:
    return fetch.fetch_folder(fetch.MINILM) if config.teacher is None else Path(config.teacher)


def _teacher(config: SentenceConfig) -> tuple[Model, Params]:
    model, params = load(_folder(config))
    if not isinstance(model.config, EncoderConfig):
        raise ValueError(f"sentences: {config.teacher} is no encoder, such as BERT, MiniLM or ModernBERT.")
    if config.length > model.config.max_length:
        raise ValueError(f"sentences: length={config.length}; the teacher has {model.config.max_length} positions.")
    return model, params


def sentences(config: SentenceConfig) -> dict[str, Sentences]:
    """Sentences of ``carried.CHITCHAT``: ``train``, and ``held_out`` of its last dialogues, none in both.

    Raises:
      ValueError: fewer sentences than asked for.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_folder(config) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    dialogues = list(json.loads(fetch.fetch(fetch.CHITCHAT).read_text()).values())
    parts = {"train": dialogues[:-HELD_OUT_DIALOGUES], "held_out": dialogues[-HELD_OUT_DIALOGUES:]}
    sides, known = {}, set()
    for name, count in (("train", config.sentences), ("held_out", config.held_out)):
        turns = (" ".join(part["text"] for part in turn) for one in parts[name] for turn in one["messages"])
        texts = [text for text in dict.fromkeys(turns) if text not in known]
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        fits = [i for i, ids in enumerate(encoded) if SHORTEST <= len(ids) <= config.length]
        if len(fits) < count:
            raise ValueError(f"sentences: {count} of {name} asked for; there are {len(fits)} of a fitting length.")
        chosen = np.random.default_rng(0).permutation(fits)[:count]
        rows = np.zeros((count, config.length), np.int32)
        for row, i in zip(rows, chosen, strict=True):
            row[: len(encoded[i])] = encoded[i]
        sides[name] = rows, [texts[i] for i in chosen]
        known.update(texts)
    return sides


def batch_of(tokens: np.ndarray) -> Batch:
    """Sentences as examples: every token that is no padding counts; labels are not used."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, tokens, tokens > 0, np.ascontiguousarray(positions), (tokens > 0).astype(np.int32))


def sentence_terms(config: SentenceConfig, student: Model, teacher: Model, teacher_params: Params) -> tuple[Term, ...]:
    """Terms on sentence embeddings; a value of a sentence stands at each of its tokens, to be averaged by sequence.

    Of the teacher's parameters only its final norm is used, where it has one.
    """
    last, norm = (student.config.layers, teacher.config.layers), teacher_params.get("norm")

    def term(name: str, loss, weight: float) -> Term:
        def value(view: View) -> Array:
            states = view.student_features["hidden"][last[0]], view.teacher_features["hidden"][last[1]]
            models = (student, view.params.get("norm")), (teacher, norm)
            sides = [pool(_normed(x, *one), view.batch.segments) for x, one in zip(states, models, strict=True)]
            return jnp.broadcast_to(loss(*sides)[:, None], view.batch.mask.shape)

        layers = [Collect(hidden=(n,)) for n in last]
        return Term(name, weight, Needs(student_layers=layers[0], teacher_layers=layers[1]), value)

    wanted = (
        ("sentence_cosine", losses.hidden_cosine, config.cosine_weight),
        ("similarity_mse", losses.similarity_mse, config.similarity_weight),
    )
    return tuple(term(*one) for one in wanted if one[2])


def _normed(hidden_BLD: Array, model: Model, norm: Params | None) -> Array:
    """The last states as ``apply`` returns them: ``collect`` keeps those before the final norm."""
    if norm is None:
        return hidden_BLD
    return layer_norm(hidden_BLD, norm["scale"], norm.get("bias"), model.config.norm_epsilon)


def _student(config: SentenceConfig, teacher: Model, params: Params, from_teacher: bool) -> Model:
    """The student, with its first parameters."""
    small, kept = keep_layers(teacher.config, params, config.layers)
    model = encoder(small)
    return dataclasses.replace(model, init=lambda key: kept) if from_teacher else model


def train(
    config: SentenceConfig,
    run: Path,
    teacher: Model,
    params: Params,
    train: Sentences,
    held_out: Sentences,
    *,
    from_teacher: bool,
) -> Params:
    """The student (or the control), trained or read from its run folder."""
    student = _student(config, teacher, params, from_teacher)
    model = with_projectors(student, projector_shapes(config.features, student, teacher))
    terms = sentence_terms(config, student, teacher, params) + feature_terms(config.features, student, teacher)
    few = held_out[0][:200]
    want = embeddings(teacher, params, few)
    asked = {name: to_dict(config)[name] for name in ("layers", "cosine_weight", "similarity_weight", "features")}
    asked |= {"training": to_dict(config)["training"], "from_teacher": from_teacher}
    task = Task(
        student=model,
        terms=terms,
        examples=batch_of(train[0]),
        teacher=teacher,
        teacher_params=params,
        evaluate=lambda now: compare(embeddings(student, without_projectors(now), few), want),
        reduction="sequence_mean",
        identity=asked | {"teacher": fingerprint(params), "data": fingerprint({"train": train[0]})},
    )
    label = "student" if from_teacher else "control"
    trained = fit(run, task, config.training, parallel_config=config.parallel, log=config.log, label=label)
    return without_projectors(trained)


def embeddings(model: Model, params: Params, tokens: np.ndarray, batch: int = 100) -> np.ndarray:
    """Sentence embeddings ``[n, D]``, a batch at a time."""
    run = jax.jit(lambda params, tokens: embed(model, params, tokens, (tokens > 0).astype(jnp.int32)))
    padded = np.pad(tokens, ((0, -len(tokens) % batch), (0, 0)))
    parts = [np.asarray(run(params, padded[i : i + batch])) for i in range(0, len(padded), batch)]
    return np.concatenate(parts)[: len(tokens)]


def compare(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """How alike two encoders find the same sentences, from unit vectors ``[n, D]``.

    Returns:
      ``pearson`` and ``spearman`` of the cosines of all pairs, ``nearest``: share of sentences whose nearest other one
      is the same, ``cosine``: mean cosine of the two embeddings of a sentence (widths must be equal).
    """
    cosines = [vectors @ vectors.T for vectors in (student, teacher)]
    pairs = [matrix[np.triu_indices(len(matrix), 1)] for matrix in cosines]
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in pairs]
    return {
        "pearson": float(np.corrcoef(*pairs)[0, 1]),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "nearest": float(np.mean(_nearest(student) == _nearest(teacher))),
        "cosine": float(np.mean(np.sum(student * teacher, axis=1))),
    }


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """Of each of ``[n, D]`` unit vectors, which other one is nearest."""
    return np.argmax(vectors @ vectors.T - 3.0 * np.eye(len(vectors)), axis=1)


def _evaluate(config: SentenceConfig, run: Path, teacher: Model, params: Params, held_out: Sentences) -> dict[str, Any]:
    student = _student(config, teacher, params, True)
    with_extra = with_projectors(student, projector_shapes(config.features, student, teacher))
    models = {
        "untrained": student.init(jax.random.key(0)),
        "student": without_projectors(restore(with_extra, run).params),
        "control": without_projectors(restore(with_extra, run / "random").params),
    }
    tokens, texts = held_out
    vectors = {"teacher": embeddings(teacher, params, tokens)}
    vectors |= {name: embeddings(student, now, tokens) for name, now in models.items()}
    size = {"parameters": student.parameter_count(), "layers": student.config.layers}
    evaluation: dict[str, Any] = {name: size | compare(vectors[name], vectors["teacher"]) for name in models}
    evaluation["teacher"] = {"parameters": teacher.parameter_count(), "layers": teacher.config.layers}
    cost = run / "cost.json"
    evaluation["cpu_seconds"] = json.loads(cost.read_text())["cpu_seconds"] if cost.is_file() else None
    evaluation["held_out"] = len(tokens)
    found = {name: [texts[i] for i in _nearest(each)[:EXAMPLES]] for name, each in vectors.items()}
    rows = [{"sentence": texts[i]} | {name: found[name][i] for name in found} for i in range(min(EXAMPLES, len(texts)))]
    write_json(run / "evaluation.json", evaluation | {"examples": rows})
    write_json(run / "summary.json", evaluation)
    return evaluation


def evaluate_folder(run: Path) -> dict[str, Any]:
    """Evaluates what stands in a run folder again."""
    config = read_config(run, SentenceConfig)
    return _evaluate(config, run, *_teacher(config), sentences(config)["held_out"])


def answer(run: Path, prompts: list[str], best: str | None = None) -> list[dict[str, str]]:
    """The held-out sentence that teacher and student, newest or best by a metric, find nearest to each prompt."""
    from tokenizers import Tokenizer

    config = read_config(run, SentenceConfig)
    teacher, params = _teacher(config)
    tokens, texts = sentences(config)["held_out"]
    tokenizer = Tokenizer.from_file(str(_folder(config) / "tokenizer.json"))
    tokenizer.enable_truncation(config.length)
    tokenizer.enable_padding(length=config.length)
    asked = np.asarray([encoding.ids for encoding in tokenizer.encode_batch(prompts)], np.int32)
    student = _student(config, teacher, params, True)
    with_extra = with_projectors(student, projector_shapes(config.features, student, teacher))
    trained = without_projectors(restore(with_extra, run, best).params)
    both = {"teacher": (teacher, params), "student": (student, trained)}
    nearest = {
        name: np.argmax(embeddings(*one, asked) @ embeddings(*one, tokens).T, axis=1) for name, one in both.items()
    }
    return [
        {"prompt": prompt} | {name: texts[found[i]] for name, found in nearest.items()}
        for i, prompt in enumerate(prompts)
    ]


def print_summary(summary: dict[str, Any], run: Path) -> None:
    """Start, student and control beside the teacher, a row each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{run}: {summary['held_out']} held-out sentences, beside the teacher", title_justify="left")
    for name in ("model", "layers", "parameters", "Spearman", "Pearson", "nearest", "cosine"):
        table.add_column(name, justify="left" if name == "model" else "right")
    labels = {"untrained": "student, untrained", "student": "student", "control": "control, from random weights"}
    for name, label in ({"teacher": "teacher"} | labels).items():
        row = summary[name]
        scores = [f"{row[key]:.4f}" if key in row else "–" for key in ("spearman", "pearson", "nearest", "cosine")]
        table.add_row(label, str(row["layers"]), f"{row['parameters']:,}", *scores)
    console = Console(width=110)
    console.print(table)
    if summary["cpu_seconds"] is not None:
        console.print(f"{summary['cpu_seconds']:.0f} CPU-seconds of training in the last session", highlight=False)
