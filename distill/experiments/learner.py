"""A student with what it learns beside its own parameters, and the terms of its objective."""

import jax

from distill.features import feature_terms, projector_shapes, with_projectors
from distill.models.model import Model
from distill.objective import ObjectiveConfig, Terms, router_terms, terms_of
from distill.shapes import Array, Params


def learner(objective: ObjectiveConfig, student: Model, teacher: Model) -> tuple[Model, Terms]:
    """The student with the projectors it learns beside itself, and the terms of its objective; computes nothing.

    Raises:
      UserError: networks whose features cannot be compared.
    """
    features = objective.features
    student = with_projectors(student, projector_shapes(features, student, teacher))
    more = feature_terms(features, student, teacher)
    return student, terms_of(objective, (*more, *router_terms(student, objective.router_weight)))


def first_params(model: Model, params: Params | None, key: Array) -> Params | None:
    """``Task.params``: where the student starts, with the projectors that ``model`` has beside, drawn.

    Args:
      model: the student with its projectors.
      params: where it starts without them; None: everything is drawn by ``fit``.
      key: of the draw, that of ``fit``.
    """
    if params is None:
        return None
    lacking = jax.eval_shape(model.init, key).keys() - params.keys()
    if not lacking:
        return params

    @jax.jit  # what is not returned is not drawn
    def draw(key: Array) -> Params:
        drawn = model.init(key)
        return {name: drawn[name] for name in lacking}

    return params | draw(key)
