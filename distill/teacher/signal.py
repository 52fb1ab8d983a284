"""The teacher's signal of a training: evaluated in every step, or stored once as ``Batch.targets``.

==========  ===============================================================  ==========================================
``targets`` what is stored of every position                                 the loss
==========  ===============================================================  ==========================================
``dense``   all logits: small vocabularies                                   equal to the live teacher's
``hidden``  final hidden states; the head stays with the step                equal to the live teacher's
``top_k``   the k most probable tokens and the mass of the others            exact for k + 1 classes, a lower bound
``sampled`` tokens drawn from the teacher, with counts (arXiv 2503.16870)    unbiased for forward KL
==========  ===============================================================  ==========================================

Live and stored signals go through the same objective (``objective.distillation_term``), whole and chunked.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from distill import losses
from distill.batch import Batch
from distill.devices import backend, processes
from distill.errors import UserError, check_fields
from distill.models.model import Model
from distill.objective import ObjectiveConfig
from distill.shapes import Params

LOGITS_AT_A_TIME = 2**27
"""Logits of the teacher that are alive at a time while targets are stored: half a GiB in float32."""


@dataclasses.dataclass(frozen=True)
class SignalConfig:
    """Where the teacher's signal comes from."""

    kind: Literal["live", "stored"] = "live"
    """live: the teacher is evaluated in every step; stored: it reads the examples once, before the first step."""
    targets: Literal["dense", "hidden", "top_k", "sampled"] = "dense"
    """What is stored: all logits, final hidden states, the most probable tokens, or drawn tokens."""
    k: int = 64
    """top_k: tokens stored of every position."""
    draws: int = 50
    """sampled: draws at every position."""

    def __post_init__(self):
        check_fields(self, "signal", self._read)
        if min(self.k, self.draws) < 1:
            raise UserError(f"signal: k={self.k}, draws={self.draws}; expected at least 1.")

    def _read(self) -> dict[str, tuple[bool, str]]:
        read = {"targets": (self.kind == "stored", "kind stored")}
        read |= {"k": (self.stores("top_k"), "kind stored and targets top_k")}
        return read | {"draws": (self.stores("sampled"), "kind stored and targets sampled")}

    def stores(self, targets: str) -> bool:
        """Are these targets stored?"""
        return self.kind == "stored" and self.targets == targets

    @property
    def at_temperature(self) -> bool:
        """Does what is stored hold for one temperature alone?"""
        return self.stores("top_k") or self.stores("sampled")


def check(config: SignalConfig, objective: ObjectiveConfig) -> None:
    """Refuses an objective that a signal cannot serve.

    Raises:
      UserError: features of a teacher that is not live, or a divergence or a schedule that what is stored does not
        allow.
    """
    if objective.features.used and config.kind == "stored":
        raise UserError(
            "objective.features: hidden states, attention maps and relations are not stored; set --signal.kind "
            "live, or their weights to 0 (--objective.features.hidden-weight 0)."
        )
    if config.at_temperature and objective.final_temperature is not None:
        raise UserError(
            f"objective: final_temperature={objective.final_temperature}, but {config.targets} targets hold for one "
            "temperature alone; leave it out, or set --signal.targets hidden."
        )
    if config.stores("sampled") and objective.distils and objective.divergence != "forward_kl":
        raise UserError(
            f"objective: divergence={objective.divergence!r} has no unbiased estimate from draws; use forward_kl, or "
            "set --signal.targets top_k."
        )
    if config.stores("top_k") and objective.distils and objective.divergence in ("logit_mse", "pearson"):
        raise UserError(
            f"objective: divergence={objective.divergence!r} compares logits, which the top k do not hold; set "
            "--signal.targets dense or hidden."
        )


def check_size(config: SignalConfig, vocab_size: int) -> None:
    """Refuses more stored tokens than there are.

    Raises:
      UserError: k above the vocabulary.
    """
    if config.stores("top_k") and config.k > vocab_size:
        raise UserError(
            f"signal: k={config.k}, but the vocabulary has {vocab_size} tokens; set --signal.k to at most {vocab_size}."
        )


@dataclasses.dataclass(frozen=True)
class HeadAlone:
    """Configuration of a teacher of which only the head is computed."""

    flops: float
    """Of a token."""

    def flops_per_token(self, length: int) -> float:
        """As ``DecoderConfig.flops_per_token``; a head costs the same at any length."""
        return self.flops


class Signal(NamedTuple):
    """What a training needs of its teacher: fields of ``train.Task``."""

    examples: Any
    """With targets where they are stored."""
    teacher: Model | None
    """Live, or its head alone; None where the targets hold all that is needed."""
    params: Params | None


def signal(
    config: SignalConfig, teacher: Model, params: Params, examples: Any, *, temperature: float = 1.0, seed: int = 0
) -> Signal:
    """The signal of a teacher on examples; stored targets are computed here.

    Args:
      config: live, or what is stored.
      teacher: the network.
      params: its parameters.
      examples: a ``Batch`` of all examples, or, of a live teacher, ``k -> batch k``.
      temperature: T of the objective, at which tokens are stored or drawn.
      seed: of the draws.

    Raises:
      UserError: stored targets of examples that are read while the model trains; k above the vocabulary; more bytes
        than a device has.
    """
    if config.kind == "live":
        return Signal(examples, teacher, params)
    check_size(config, teacher.vocab_size)
    if callable(examples):
        raise UserError(
            "signal: targets are stored for examples in memory, and these are read from the disk; set --signal.kind "
            "live, or leave out streaming."
        )
    targets = _targets(config, teacher, params, examples, temperature, seed)
    if config.targets == "hidden":
        return Signal(examples._replace(targets=targets), *head_alone(teacher, params))
    return Signal(examples._replace(targets=targets), None, None)


def _targets(config: SignalConfig, teacher: Model, params: Params, examples: Batch, temperature: float, seed: int):
    """Targets of all examples, on the host, some rows at a time."""
    rows, length = examples.inputs.shape
    size = min(rows, max(1, LOGITS_AT_A_TIME // (length * teacher.vocab_size)))

    def of_rows(params: Params, batch: Batch, first: int) -> Any:
        inputs = {"positions": batch.positions, "segments": batch.segments}
        hidden = teacher.apply(params, batch.inputs, **inputs).hidden
        if config.targets == "hidden":
            return losses.HiddenTargets(hidden)
        logits = teacher.unembed(params, hidden)
        if config.targets == "dense":
            return losses.DenseTargets(logits)
        if config.targets == "top_k":
            return losses.top_k_targets(logits, config.k, temperature=temperature)
        key = jax.random.fold_in(jax.random.key(seed), first)
        return losses.sample_targets(key, logits, config.draws, temperature=temperature)

    _check_room(config, jax.eval_shape(of_rows, params, jax.tree.map(lambda x: x[:size], examples), 0), rows / size)
    compiled, parts = jax.jit(of_rows), []
    for first in range(0, rows, size):
        place = np.minimum(np.arange(first, first + size), rows - 1)  # one shape: the last part repeats its last row
        batch = jax.device_put(jax.tree.map(lambda field, place=place: field[place], examples))
        kept = min(size, rows - first)
        parts.append(jax.tree.map(lambda x, kept=kept: processes.fetch(x)[:kept], compiled(params, batch, first)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _check_room(config: SignalConfig, part: Any, parts: float) -> None:
    """Refuses targets that no device of this kind can hold; they lie whole on each, beside the examples.

    Raises:
      UserError: more bytes than the device has.
    """
    need, there = (placed / 2**30 for placed in (parts * _bytes(part), backend.device_bytes()))
    if 0.0 < there < need:
        smaller = " or ".join(kind for kind in ("hidden", "top_k", "sampled") if kind != config.targets)
        raise UserError(
            f"signal: targets={config.targets!r} of all examples take {need:.0f} GiB, and a device has {there:.0f} "
            f"GiB; set --signal.targets {smaller}, or --signal.kind live."
        )


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def head_alone(model: Model, params: Params) -> tuple[Model, Params]:
    """The model's head and no more: enough to read stored hidden states, without the rest on the devices.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16, tied=True))
      >>> small, params = head_alone(model, model.init(jax.random.key(0)))
      >>> sorted(params), small.parameter_count()
      (['embedding'], 112)
    """
    if model.head is None:
        raise UserError("signal: hidden states need a model that knows its head(params); store dense targets instead.")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    names = [name for name in shapes if _reads(model, shapes, name)]

    def part(tree: Params) -> Params:
        return {name: tree[name] for name in names}

    def apply(*_: Any, **__: Any):
        raise UserError("signal: this teacher is its head alone; it reads stored hidden states.")

    axes = None if model.axes is None else part(model.axes)
    config = HeadAlone(2.0 * math.prod(jax.eval_shape(model.head, shapes).kernel.shape))
    alone = {"init": lambda key: part(model.init(key)), "apply": apply, "axes": axes, "config": config}
    return dataclasses.replace(model, **alone), part(params)


def _reads(model: Model, shapes: Params, name: str) -> bool:
    """Does the head read the parameters of this name?"""
    without = {other: value for other, value in shapes.items() if other != name}
    try:
        jax.eval_shape(model.head, without)
    except KeyError:
        return True
    return False
