"""Feature distillation: terms between the layers of teacher and student, beside those between their logits.

A term declares the layers it needs (``Collect``); only these are kept on the way through both networks. Layers are
matched by ``losses.layer_map``, and a mean over the matched pairs is taken, so that a weight means the same
at any depth. Widths that differ meet through a learned projector, which lives in the student's parameter tree under
``projectors`` (``with_projectors``), learns with it, and is dropped when training ends.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from distill.batch import Batch
from distill.errors import UserError, check_fields
from distill.losses import hidden, reduce
from distill.models.config import EncoderConfig
from distill.models.model import Model
from distill.models.output import Collect
from distill.models.parameters import normal
from distill.shapes import Array, Nats, Params
from distill.term import Needs, Term, View
from distill.trees import joined

HIDDEN_LOSSES = {"mse": hidden.hidden_mse, "cosine": hidden.hidden_cosine, "projected_mse": hidden.projected_mse}


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Hidden states, attention maps and relations of tokens; what has a weight of 0 is left out."""

    hidden_weight: float = 0.0
    hidden_loss: Literal[*HIDDEN_LOSSES] = "projected_mse"
    """projected_mse learns a map from the student's width to the teacher's; the others want equal widths."""
    embeddings: bool = False
    """Compare the embeddings too, as layer 0."""
    attention_weight: float = 0.0
    """KL of attention maps (MiniLM, arXiv 2002.10957)."""
    average_heads: bool = False
    """Average attention maps over heads first: for numbers of heads that differ."""
    relation_weight: float = 0.0
    """KL of query, key and value relations, summed (MiniLM v2, arXiv 2012.15828): last layer against last layer."""
    relation_heads: int = 1
    relation_layer: int | None = None
    """The teacher's layer for the relations, counted from 1; None: its last."""
    layers: Literal["uniform", "last", "first"] = "uniform"
    """Which teacher layers the student's layers learn hidden states and attention from (``losses.layer_map``)."""

    def __post_init__(self):
        check_fields(self, "features", self._read)
        if min(self.hidden_weight, self.attention_weight, self.relation_weight) < 0.0:
            raise UserError("features: weights must be at least 0.")
        if self.relation_heads < 1:
            raise UserError(f"features: relation_heads={self.relation_heads}; expected at least 1.")

    def _read(self) -> dict[str, tuple[bool, str]]:
        """Hyperparameter → whether a term with a weight above 0 reads it."""
        weights = {name: vars(self)[name] for name in ("hidden_weight", "attention_weight", "relation_weight")}
        hidden, maps, relations = ((weight > 0.0, f"a {name} above 0") for name, weight in weights.items())
        matched = (hidden[0] or maps[0], "a hidden_weight or attention_weight above 0")
        read = {"hidden_loss": hidden, "embeddings": hidden, "average_heads": maps, "layers": matched}
        return read | {"relation_heads": relations, "relation_layer": relations}

    @property
    def used(self) -> bool:
        """Does any term count?"""
        return self.hidden_weight + self.attention_weight + self.relation_weight > 0.0

    @property
    def projected(self) -> bool:
        """Is anything learnt beside the student?"""
        return self.hidden_weight > 0.0 and self.hidden_loss == "projected_mse"


def feature_terms(config: FeatureConfig, student: Model, teacher: Model) -> tuple[Term, ...]:
    """The terms with a weight above 0, for these two models.

    Raises:
      UserError: widths, heads or layers that a term cannot compare, or a model that keeps no features.
    """
    if not config.used:
        return ()
    depths = [_depth(name, model) for name, model in (("student", student), ("teacher", teacher))]
    terms = []
    if config.hidden_weight:
        pairs = hidden.layer_map(*depths, config.layers)
        terms.append(_hidden_term(config, (((0, 0),) if config.embeddings else ()) + pairs))
    if config.attention_weight:
        terms.append(_attention_term(config, hidden.layer_map(*depths, config.layers)))
    if config.relation_weight:
        layers = depths[0], config.relation_layer or depths[1]
        terms.append(_relation_term(config, *layers, causal=not isinstance(student.config, EncoderConfig)))
    _try(terms, student, teacher)
    return tuple(terms)


def _depth(name: str, model: Model) -> int:
    if getattr(model.config, "layers", None) is None:
        raise UserError(f"features: the {name} has no config with a number of layers; use models.decoder.")
    return model.config.layers


def _hidden_term(config: FeatureConfig, pairs) -> Term:
    loss = HIDDEN_LOSSES[config.hidden_loss]

    def value(view: View) -> Nats:
        extra = (view.params["projectors"]["hidden"],) if config.projected else ()

        def one(m: int, n: int) -> Nats:
            states = view.student_features["hidden"][m], view.teacher_features["hidden"][n]
            return loss(*(reduce.select(x, view.batch.mask) for x in states), *extra)

        return sum(one(m, n) for m, n in pairs) / len(pairs)

    needs = _layers(*(Collect(hidden=tuple(layers)) for layers in zip(*pairs, strict=True)))
    return Term(f"hidden_{config.hidden_loss}", config.hidden_weight, needs, value)


def _attention_term(config: FeatureConfig, pairs) -> Term:
    def value(view: View) -> Nats:
        options = {"segments": view.batch.segments, "average_heads": config.average_heads}
        maps = ((view.student_features["attention"][m], view.teacher_features["attention"][n]) for m, n in pairs)
        return sum(hidden.attention_kl(s, t, **options) for s, t in maps) / len(pairs)

    needs = _layers(*(Collect(attention=tuple(layers)) for layers in zip(*pairs, strict=True)))
    return Term("attention_kl", config.attention_weight, needs, value)


def _relation_term(config: FeatureConfig, student_layer: int, teacher_layer: int, *, causal: bool) -> Term:
    def value(view: View) -> Nats:
        options = {"segments": view.batch.segments, "relation_heads": config.relation_heads, "causal": causal}
        of_student, of_teacher = view.student_features["relations"], view.teacher_features["relations"]
        kinds = zip(of_student[student_layer], of_teacher[teacher_layer], strict=True)
        return sum(hidden.relation_kl(s, t, **options) for s, t in kinds)

    needs = _layers(Collect(relations=(student_layer,)), Collect(relations=(teacher_layer,)))
    return Term("relation_kl", config.relation_weight, needs, value)


def _layers(student: Collect, teacher: Collect) -> Needs:
    return Needs(student_layers=student, teacher_layers=teacher)


def _try(terms: Sequence[Term], student: Model, teacher: Model) -> None:
    """Every check of the losses, on shapes alone."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    batch = Batch(tokens, tokens, tokens == 0, tokens, tokens + 1)

    def values(key: Array):
        sides = [(model, _whole(model, key)) for model in (student, teacher)]
        wanted = [collect_of(terms, name) for name in ("student", "teacher")]
        features = [
            model.apply(params, tokens, collect=collect).collected
            for (model, params), collect in zip(sides, wanted, strict=True)
        ]
        view = View(student_features=features[0], teacher_features=features[1], batch=batch, params=sides[0][1])
        return [term.value(view) for term in terms]

    try:
        jax.eval_shape(values, jax.random.key(0))
    except ValueError as error:
        raise UserError(f"features: {error}") from error


def _whole(model: Model, key: Array) -> Params:
    return model.init(key) if model.base is None else joined(model.base.init(key), model.init(key))


def collect_of(terms: Sequence[Term], side: Literal["student", "teacher"]) -> Collect | None:
    """All layers that terms need of one side; None if they need none."""
    of = {"student": lambda needs: needs.student_layers, "teacher": lambda needs: needs.teacher_layers}[side]
    wanted = [layers for layers in (of(term.needs) for term in terms) if layers is not None]
    if not wanted:
        return None
    asked = [dataclasses.asdict(layers) for layers in wanted]
    return Collect(**{name: tuple(sorted({n for each in asked for n in each[name]})) for name in asked[0]})


def projector_shapes(config: FeatureConfig, student: Model, teacher: Model) -> dict[str, tuple[int, int]]:
    """The projectors the configuration needs, name → (student's width, teacher's width)."""
    return {"hidden": (student.config.width, teacher.config.width)} if config.projected else {}


def with_projectors(model: Model, shapes: dict[str, tuple[int, int]]) -> Model:
    """The model with learned projectors beside its parameters: ``params["projectors"][name]``, ``[Ds, Dt]``.

    Everything that is done with parameters (optimizer, sharding, checkpoints) is then done with the projectors; the
    network does not see them. ``without_projectors`` gives the parameters of the model alone.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
      >>> params = with_projectors(model, {"hidden": (8, 32)}).init(jax.random.key(0))
      >>> params["projectors"]["hidden"].shape, "projectors" in without_projectors(params)
      ((8, 32), False)
    """
    if not shapes:
        return model

    def init(key: Array) -> Params:
        keys = jax.random.split(jax.random.fold_in(key, 1), len(shapes))
        drawn = {
            name: normal(one, shape) * shape[0] ** -0.5 for one, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return model.init(key) | {"projectors": drawn}

    def apply(params: Params, *inputs: Any, **options: Any):
        return model.apply(without_projectors(params), *inputs, **options)

    axes = None if model.axes is None else model.axes | {"projectors": {name: ("embed", "norm") for name in shapes}}
    head = None if model.head is None else lambda params: model.head(without_projectors(params))
    return dataclasses.replace(
        model,
        init=init,
        apply=apply,
        unembed=lambda params, hidden: model.unembed(without_projectors(params), hidden),
        head=head,
        axes=axes,
    )


def without_projectors(params: Params) -> Params:
    """The model's own parameters."""
    return {name: value for name, value in params.items() if name != "projectors"}
