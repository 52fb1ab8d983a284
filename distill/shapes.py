"""The dimension key, named once.

Models carry the letters as suffixes (``x_BLD``); losses are rank-free and use the names.

====  ==========================  ====  ==========================
B     batch                       G     key/value groups
L     length (queries)            K     size of one head
S     length (keys)               R     query heads per group, H/G
V     vocabulary                  F     feed-forward
D     model width                 N     layers
H     query heads                 E     experts
====  ==========================  ====  ==========================
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
else:
    try:  # pytest, where jaxtyping is installed, checks shapes; elsewhere they are comments
        from jaxtyping import Array, Bool, Float, Int
    except ImportError:
        from jax import Array

        class _Annotation:
            """Stands in for jaxtyping's ``Float[Array, "*batch vocab"]``: a comment for the reader."""

            def __getitem__(self, item: Any) -> Any:
                return Array

        Bool = Float = Int = _Annotation()

Logits = Float[Array, "*batch vocab"]
Nats = Float[Array, "*batch"]
Labels = Int[Array, "*batch"]
Mask = Bool[Array, "*batch"]
Scalar = float | Float[Array, ""]
"""A hyperparameter that may follow a schedule."""
Params = dict[str, Any]
"""Weights: plain nested dicts of arrays."""

__all__ = ["Array", "Bool", "Float", "Int", "Labels", "Logits", "Mask", "Nats", "Params", "Scalar"]
