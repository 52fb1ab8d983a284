"""Losses: pure functions from logits to nats per position. Nothing here averages but ``reduce``.

>>> import jax.numpy as jnp
>>> from distill import losses
>>> student, teacher = jnp.zeros((2, 3)), jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]))
>>> losses.forward_kl(student, teacher).round(4)
Array([0.0589, 0.    ], dtype=float32)
"""

from distill.losses.divergences import forward_kl, generalized_jsd, reverse_kl
from distill.losses.hidden import attention_kl, hidden_cosine, hidden_mse, layer_map, projected_mse, relation_kl
from distill.losses.labels import cross_entropy
from distill.losses.reduce import divide, masked_sum

__all__ = [
    "attention_kl",
    "cross_entropy",
    "divide",
    "forward_kl",
    "generalized_jsd",
    "hidden_cosine",
    "hidden_mse",
    "layer_map",
    "masked_sum",
    "projected_mse",
    "relation_kl",
    "reverse_kl",
]
