"""The loss that keeps the experts of a mixture equally busy."""

import jax
import jax.numpy as jnp

from distill.shapes import Array, Float, Nats


def load_balancing(
    counts: Float[Array, "*layers experts"], probabilities: Float[Array, "*layers experts"], total: Array | None = None
) -> Nats:
    """E · Σ_e f_e · P_e, least where tokens are spread evenly: then it is k, the experts of a token.

    f_e is the share of tokens that went to expert e, P_e the mean probability of e; both over all tokens of all layers
    at once. Only P has a gradient.

    Args:
      counts: tokens that went to each expert, from ``Output.routing``.
      probabilities: sum over tokens of each expert's probability.
      total: tokens times layers, of which both are shares; None: those of ``probabilities``, which sum to 1 a token.
        Where tokens lie on several devices, give the counts and the total of all: the parts then add up to the loss.

    Returns:
      A scalar, float32; 0 without tokens.

    Reference: Switch Transformer, arXiv 2101.03961, equations 4 to 6, for k experts a token; per layer there, over all
    layers here, as in transformers.

    Example:
      >>> load_balancing(jnp.array([6.0, 2.0]), jnp.array([2.0, 2.0])).item()  # 4 tokens, 2 experts each
      2.0
    """
    experts = counts.shape[-1]
    counts, probabilities = (x.astype(jnp.float32).reshape(-1, experts).sum(axis=0) for x in (counts, probabilities))
    total = jax.lax.stop_gradient(jnp.sum(probabilities)) if total is None else total
    return experts * jnp.sum(counts * probabilities) / jnp.maximum(total, 1.0) ** 2
