"""100 products [2048, 512] · [512, 1536] in float32 by XLA in place of a step: the peak of the machine."""

import jax
import jax.numpy as jnp
from step_worker import turns


def main():
    """Computes the products, twice in every turn."""
    a, b = jnp.ones((2048, 512)), jnp.ones((512, 1536))
    product = jax.jit(jnp.matmul)
    for _ in turns():
        for _ in range(100):
            jax.block_until_ready(product(a, b))


if __name__ == "__main__":
    main()
