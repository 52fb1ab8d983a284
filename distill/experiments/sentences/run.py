"""Sentences: an encoder distilled into one with fewer of its layers, judged by how alike they find held-out sentences.

    RUN/          the student: layers of the teacher, then trained (``runner.py``)
    RUN/random/   the control: the same network from random weights, as many steps on the same batches

No sentence is labelled: the teacher's embeddings and relations are learnt.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.errors import UserError
from distill.experiments import fingerprints
from distill.experiments.cost import ledger
from distill.experiments.folder import Trained, identity
from distill.experiments.learner import first_params
from distill.experiments.preflight import Side
from distill.experiments.runner import Arm, Look, Work
from distill.experiments.sentences import corpus
from distill.experiments.sentences.config import SentenceConfig
from distill.experiments.sentences.corpus import Sentences
from distill.experiments.sentences.measure import compare, embeddings, nearest
from distill.experiments.sentences.pooling import Pooling, read_pooling
from distill.features import feature_terms, projector_shapes, with_projectors, without_projectors
from distill.models.config import EncoderConfig
from distill.models.encoder import Kind, encoder, keep_layers, pool
from distill.models.layers import layer_norm
from distill.models.model import Model
from distill.models.output import Collect
from distill.shapes import Array, Params
from distill.term import Needs, Term, View
from distill.train import Evaluate, Task
from distill.weights.folder import load, located

CONFIG = SentenceConfig
CURVE_ROWS = 200
"""Held-out sentences measured for the learning curve."""
EXAMPLES = 6
"""Held-out sentences whose nearest neighbours are written down."""
NAMES = {
    "teacher": "teacher",
    "untrained": "student, untrained",
    "student": "student",
    "control": "control, from random weights",
}
COLUMNS = {
    "layers": ("layers", "d"),
    "parameters": ("parameters", ","),
    "Spearman": ("spearman", ".4f"),
    "Pearson": ("pearson", ".4f"),
    "nearest": ("nearest", ".4f"),
    "cosine": ("cosine", ".4f"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Everything that both arms share."""

    config: SentenceConfig
    run: Path
    teacher: Trained
    sides: dict[str, Sentences]
    student: Trained
    """The student before its first step: layers of the teacher."""
    pooling: Pooling
    """Of the teacher, and of the student."""

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of teacher and sentences; only a training asks for them."""
        teacher = fingerprints.of_files(located(corpus.teacher_folder(self.config)))
        known = {"teacher": teacher, "data": fingerprints.of_tree(self.sides["train"].tokens)}
        return known if self.pooling.kind == "mean" else known | {"pooling": self.pooling.kind}

    def embed(self, model: Model, params: Params, sentences: Sentences) -> np.ndarray:
        """Embeddings ``[n, D]`` of norm 1."""
        return embeddings(model, params, sentences.tokens, sentences.segments, self.pooling.kind)


def prepare(config: SentenceConfig, run: Path) -> World:
    """Teacher, student and sentences.

    Raises:
      MissingFile: no such teacher.
      UserError: a teacher that is no encoder or too short, or whose pooling is not supported, layers it has not, too
        few sentences.
    """
    folder = corpus.teacher_folder(config)
    model, params = load(folder)
    if not isinstance(model.config, EncoderConfig):
        raise UserError(f"sentences: {config.teacher} is no encoder, such as BERT, MiniLM or ModernBERT.")
    if config.length > model.config.max_length:
        raise UserError(f"sentences: length={config.length}; the teacher has {model.config.max_length} positions.")
    pooling = read_pooling(located(folder), model.config.width)
    if pooling.longest is not None and config.length > pooling.longest:
        raise UserError(f"sentences: length={config.length}; the teacher reads {pooling.longest} tokens of a sentence.")
    small, kept = keep_layers(model.config, params, config.layers)
    sides, student = corpus.sentences(config), Trained(encoder(small), kept)
    return World(config, run, Trained(model, params), sides, student, pooling)


def sentence_terms(
    config: SentenceConfig, student: Model, teacher: Model, teacher_params: Params, kind: Kind = "mean"
) -> tuple[Term, ...]:
    """Terms on sentence embeddings; a value of a sentence stands at each of its tokens, to be averaged by sequence.

    Of the teacher's parameters only its final norm is used, where it has one.
    """
    last, norm = (student.config.layers, teacher.config.layers), teacher_params.get("norm")

    def term(name: str, loss, weight: float) -> Term:
        def value(view: View) -> Array:
            states = view.student_features["hidden"][last[0]], view.teacher_features["hidden"][last[1]]
            models = (student, view.params.get("norm")), (teacher, norm)
            sides = [pool(_normed(x, *one), view.batch.segments, kind) for x, one in zip(states, models, strict=True)]
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


def arms(world: World, trained: dict[str, Trained]) -> Iterator[Arm]:
    """The student, and the control."""
    del trained  # no arm starts from another
    student, folder = world.student.model, corpus.teacher_folder(world.config)
    files = dict(world.pooling.files)
    for name, title, run, params, export in (
        ("student", "distillation", world.run, world.student.params, lambda student: (*student, folder, files)),
        ("control", "control, from random weights", world.run / "random", None, None),
    ):
        work = functools.partial(_work, world, params)
        sides = {"learns": student, "model": student, "plain": without_projectors}
        yield Arm(name, title, run, work=work, export=export, **sides)


def _work(world: World, params: Params | None) -> Work:
    """Task of an arm; ``params``: where it starts, None: at random."""
    config, teacher, student = world.config, world.teacher, world.student.model
    model = with_projectors(student, projector_shapes(config.features, student, teacher.model))
    terms = sentence_terms(config, student, *teacher, world.pooling.kind)
    terms += feature_terms(config.features, student, teacher.model)
    parts = ("layers", "cosine_weight", "similarity_weight", "features", "training")
    task = Task(
        student=model,
        terms=terms,
        examples=corpus.batch_of(world.sides["train"]),
        teacher=teacher.model,
        teacher_params=teacher.params,
        params=first_params(model, params, jax.random.key(config.training.seed)),
        evaluate=_curve(world),
        reduction="sequence_mean",
        identity=identity(config, *parts, from_teacher=params is not None, **world.fingerprints),
    )
    sides = Side(*world.student), Side(*teacher)
    look = None if params is None else lambda: Look(*sides, None)
    return Work(None, task, config.training, look, plan=True)


def _curve(world: World) -> Evaluate:
    """Measures of the first held-out sentences, for the learning curve."""
    few = Sentences(*(part[:CURVE_ROWS] for part in world.sides["held_out"]))
    want = world.embed(*world.teacher, few)
    return lambda params: compare(world.embed(world.student.model, without_projectors(params), few), want)


def evaluate(world: World, trained: dict[str, Trained]) -> dict[str, Any]:
    """Student, control and the untrained student beside the teacher, on all held-out sentences."""
    held_out, texts = world.sides["held_out"], world.sides["held_out"].texts
    models = {"untrained": world.student} | trained
    vectors = {name: world.embed(*one, held_out) for name, one in ({"teacher": world.teacher} | models).items()}
    evaluation: dict[str, Any] = {
        name: _size(one.model) | compare(vectors[name], vectors["teacher"]) for name, one in models.items()
    }
    evaluation["teacher"] = _size(world.teacher.model)
    spent = ledger({"student": world.run, "control": world.run / "random"})["rows"]
    evaluation["cpu_seconds"] = sum(row["cpu_seconds"] for row in spent) if spent else None
    evaluation["held_out"] = len(texts)
    found = {name: [texts[i] for i in nearest(each)[:EXAMPLES]] for name, each in vectors.items()}
    count = min(EXAMPLES, len(texts))
    rows = [{"sentence": texts[i]} | {name: found[name][i] for name in found} for i in range(count)]
    return evaluation | {"examples": rows}


def _size(model: Model) -> dict[str, int]:
    return {"parameters": model.parameter_count(), "layers": model.config.layers}


def summarize(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation without examples and ledger."""
    return {name: value for name, value in evaluation.items() if name not in ("examples", "ledger")}


def write(world: World, trained: dict[str, Trained], prompts: list[str]) -> list[dict[str, str]]:
    """The held-out sentence that teacher and student find nearest to each prompt."""
    from tokenizers import Tokenizer

    held_out = world.sides["held_out"]
    tokenizer = Tokenizer.from_file(str(corpus.teacher_folder(world.config) / "tokenizer.json"))
    tokenizer.enable_truncation(world.config.length)
    tokenizer.no_padding()
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    asked = Sentences(*corpus.padded(encoded, world.config.length), prompts)
    both = {"teacher": world.teacher, "student": trained["student"]}
    cosines = {name: world.embed(*one, asked) @ world.embed(*one, held_out).T for name, one in both.items()}
    found = {name: [held_out.texts[i] for i in np.argmax(each, axis=1)] for name, each in cosines.items()}
    return [{"prompt": prompt} | {name: found[name][i] for name in both} for i, prompt in enumerate(prompts)]


def notes(summary: dict[str, Any]) -> list[str]:
    """Number of sentences compared, and cost of training."""
    spent = summary["cpu_seconds"]
    lines = [f"beside the teacher, on {summary['held_out']} held-out sentences"]
    return lines if spent is None else [*lines, f"{spent:.0f} CPU-seconds of training"]
