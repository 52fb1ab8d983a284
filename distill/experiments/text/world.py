"""Teacher, tokenizer, text and the student before its first step: shared by all arms of an experiment on text."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.batch import Batch
from distill.data import prepared
from distill.data.loader import Loader
from distill.data.packing import Rows
from distill.data.stream import StreamLoader, blocks, open_rows
from distill.devices import processes
from distill.errors import UserError
from distill.evaluation.heldout import Heldout
from distill.experiments import fingerprints
from distill.experiments.folder import Trained
from distill.experiments.learner import learner
from distill.experiments.text.config import TextConfig
from distill.models.decoder import decoder
from distill.models.int8 import int8, quantizer
from distill.models.model import Model
from distill.parallel import RULES, batch_axes, make_mesh, param_shardings, uses_mesh
from distill.shapes import Params
from distill.students.cut import part_of
from distill.students.layers import CHOICES
from distill.students.start import Calibration, Start, start
from distill.students.vocabulary import Pruned, prune_by, prune_model
from distill.tokenizer import TextTokenizer
from distill.vocab import align
from distill.weights import published
from distill.weights.published import Published

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Everything that the arms share."""

    config: TextConfig
    run: Path
    teacher: Trained
    tokenizer: TextTokenizer
    begin: Start
    """The student before its first step, the same in every arm."""
    student: Model
    """The plain student, as it is measured and saved."""
    train: Batch | Callable[[int], Batch]
    """All examples, or batch k of them."""
    heldout: Heldout
    prompts: np.ndarray
    """``[prompts, prompt_tokens]``: how held-out rows begin."""

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of tokenizer, teacher and text; only a training asks for them."""
        teacher = fingerprints.of_files(published.located(self.config.teacher))
        text = prepared.fingerprint(self.config.data, self.tokenizer)
        return {"tokenizer": self.tokenizer.fingerprint(), "teacher_weights": teacher, "text": text}

    @property
    def key(self) -> jax.Array:
        """Key of the student's first parameters, where they are drawn."""
        return jax.random.key(self.config.training.seed)

    @property
    def first(self) -> Params:
        """Parameters of the plain student before its first step."""
        return self.begin.plain(self.begin.learnt(self.key))


def prepare(config: TextConfig, run: Path) -> World:
    """Reads models and text: everything that can be wrong is found here, before any training.

    Raises:
      MissingFile: no such model or text.
      UserError: models that do not fit together, a student that cannot be made, too little text.
    """
    source, rules = config.student.source, config.parallel.student
    # A student or a vocabulary is cut out of the teacher before its kernels are rounded.
    late = config.teacher_dtype == "int8" and (source is None or config.vocabulary is not None)
    teacher = _read(config, config.teacher, "bfloat16" if late else config.teacher_dtype, config.parallel.teacher)
    own = None if source is None else _read(config, source, "float32", rules)
    if own is not None:
        teacher = _within(teacher, own.tokenizer)
        align(own.tokenizer.ids(), teacher.tokenizer.ids(), own.model.vocab_size, teacher.model.vocab_size)
    if config.vocabulary is not None:
        pruned = prune_by(teacher.tokenizer, _uses(config, teacher.tokenizer), config.vocabulary)
        teacher, own = (None if one is None else _pruned(one, pruned) for one in (teacher, own))
    tokenizer, network = teacher.tokenizer, Trained(teacher.model, teacher.params)
    loader, heldout = _text(config, tokenizer)
    begin = _cut_out(config, network, loader) if own is None else Start(own.model, own.params, None)
    if late:
        params = jax.tree_util.tree_map_with_path(quantizer(network.model), network.params)
        network = Trained(int8(network.model), params)
    plain = begin.model
    if not config.student.start.plain:
        plain = decoder(plain.config).with_vocabulary(plain.vocab_size)
    learner(config.objective, begin.model, network.model)
    for name, model in (("teacher", network.model), ("student", plain)):
        _check_length(name, model, config.data.length)
    heldout = heldout.take(slice(config.heldout_rows))
    train = loader.examples if isinstance(loader, Loader) else _own_part(config, loader).batch
    kept = Heldout(*network, heldout.batch(), _mesh(config))
    return World(config, run, network, tokenizer, begin, plain, train, kept, _prompts(config, heldout))


def _check_length(name: str, model: Model, length: int) -> None:
    """Logs rows that are longer than the texts a model was trained on."""
    most = model.config.max_length
    if most is not None and length > most:
        log.warning("data.length=%d, but the %s was made for texts of at most %d tokens.", length, name, most)


def _mesh(config: TextConfig) -> jax.sharding.Mesh | None:
    """The mesh of the run; None where it has none."""
    return make_mesh(config.parallel) if uses_mesh(config.parallel) else None


def _read(config: TextConfig, name: str, dtype: str, rules: str) -> Published:
    """A published model, each parameter read straight to where the mesh wants it."""
    mesh = _mesh(config)
    sharding = None if mesh is None else lambda model: param_shardings(model, mesh, RULES[rules])
    return published.read(name, dtype=dtype, activations=config.activations, sharding=sharding)


def _within(teacher: Published, known: TextTokenizer) -> Published:
    """The teacher without control tokens that its student has no rows for; unchanged if they differ in more."""
    try:
        tokenizer = teacher.tokenizer.within(known.vocab_size)
    except ValueError:
        return teacher  # ``align`` raises, and names the difference
    return Published(teacher.model.with_vocabulary(tokenizer.vocab_size), teacher.params, tokenizer)


def _own_part(config: TextConfig, loader: StreamLoader) -> StreamLoader:
    """The stream, of which a process reads the rows that lie on its devices."""
    mesh = _mesh(config)
    if mesh is None or processes.count() == 1:
        return loader
    rows, size = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(batch_axes(mesh))), loader.batch_size
    places = rows.addressable_devices_indices_map((size,)).values()
    own = np.unique(np.concatenate([np.arange(size)[where] for where in places]))
    return StreamLoader(loader.source, size, loader.seed, own=own)


def _uses(config: TextConfig, tokenizer: TextTokenizer) -> collections.Counter[int]:
    """How often the text to train on uses each token."""
    uses: collections.Counter[int] = collections.Counter()
    for rows in blocks(open_rows(config.data, tokenizer, "train", config.data_dir)):
        uses.update(rows.tokens[rows.segments > 0].tolist())
    return uses


def _pruned(whole: Published, pruned: Pruned) -> Published:
    model, params = prune_model(whole.model, whole.params, pruned.ids)
    return Published(model, params, pruned.tokenizer)


def _text(config: TextConfig, tokenizer: TextTokenizer) -> tuple[Loader | StreamLoader, Rows]:
    """The text to train on, in memory or on the disk, and the held-out rows."""
    options = config.training.batch_size, config.training.seed
    if config.streaming:
        source = open_rows(config.data, tokenizer, "train", config.data_dir)
        heldout = prepared.prepare(config.data, tokenizer, config.data_dir, ("heldout",))
        return StreamLoader(source, *options), heldout["heldout"]
    rows = prepared.prepare(config.data, tokenizer, config.data_dir)
    return Loader(rows["train"].batch(), *options), rows["heldout"]


def _cut_out(config: TextConfig, teacher: Trained, loader: Loader | StreamLoader) -> Start:
    """The student as a part of its teacher; units are chosen by importance on the training text."""
    asked, whole = config.student, teacher.model.config
    sizes = {name: getattr(asked, name) for name in ("kv_heads", "feed_forward", "width")}
    layers = asked.start.layers or (asked.layers and CHOICES[asked.start.choice](asked.layers, whole.layers))

    def batches() -> Iterator[Batch]:
        return map(loader.batch, range(asked.calibration_batches))

    small, calibration = part_of(whole, layers=layers, **sizes), Calibration(_nll, batches)
    begin = start(*teacher, small, asked.start, calibration, seed=config.training.seed)
    # What learns is float32, and a copy: the teacher's arrays may be rounded and let go of.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), begin.params)
    return begin._replace(params=params)


def _nll(model: Model, params: Params, batch: Batch) -> Any:
    states = model.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments).hidden
    student = states, model.head(params)
    return losses.divide(losses.chunked(_cross_entropy, student, None, batch.labels, batch.mask))


def _cross_entropy(student_logits, _, labels):
    return losses.cross_entropy(student_logits, labels)


def _prompts(config: TextConfig, heldout: Rows) -> np.ndarray:
    """How held-out rows begin, where one document is so long."""
    length = config.prompt_tokens
    whole = heldout.segments[:, length - 1] == 1
    if not whole.any():
        raise UserError(f"prompt_tokens={length}: no held-out row begins with {length} tokens of one document.")
    return heldout.tokens[whole][: config.prompts, :length].astype(np.int32)
