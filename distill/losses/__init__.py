"""Losses: pure functions from logits to nats per position. Nothing here averages but ``reduce``.

>>> import jax.numpy as jnp
>>> from distill import losses
>>> student, teacher = jnp.zeros((2, 3)), jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]))
>>> losses.forward_kl(student, teacher).round(4)
Array([0.0589, 0.    ], dtype=float32)
"""

from distill.head import Head
from distill.losses.adaptive import adaptive_kl, entropy_aware_kl, taid
from distill.losses.divergences import (
    alpha_beta,
    alpha_divergence,
    forward_kl,
    generalized_jsd,
    jeffreys,
    renyi,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from distill.losses.fused_head import chunked
from distill.losses.hidden import (
    attention_kl,
    hidden_cosine,
    hidden_mse,
    layer_map,
    projected_mse,
    relation_kl,
    similarity_mse,
)
from distill.losses.labels import cross_entropy
from distill.losses.matching import logit_mse, pearson
from distill.losses.reduce import divide, masked_sum, select, sequence_weights
from distill.losses.routing import load_balancing
from distill.losses.stored import (
    DenseTargets,
    HiddenTargets,
    SampledTargets,
    SparseTargets,
    from_targets,
    logits_of,
    sample_targets,
    sampled_cross_entropy,
    sampled_forward_kl,
    sparse,
    top_k_forward_kl,
    top_k_targets,
)

__all__ = [
    "DenseTargets",
    "Head",
    "HiddenTargets",
    "SampledTargets",
    "SparseTargets",
    "adaptive_kl",
    "alpha_beta",
    "alpha_divergence",
    "attention_kl",
    "chunked",
    "cross_entropy",
    "divide",
    "entropy_aware_kl",
    "forward_kl",
    "from_targets",
    "generalized_jsd",
    "hidden_cosine",
    "hidden_mse",
    "jeffreys",
    "layer_map",
    "load_balancing",
    "logit_mse",
    "logits_of",
    "masked_sum",
    "pearson",
    "projected_mse",
    "relation_kl",
    "renyi",
    "reverse_kl",
    "sample_targets",
    "sampled_cross_entropy",
    "sampled_forward_kl",
    "select",
    "sequence_weights",
    "similarity_mse",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "sparse",
    "taid",
    "top_k_forward_kl",
    "top_k_targets",
    "total_variation",
]
