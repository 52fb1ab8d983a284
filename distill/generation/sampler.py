"""Generation: prefill, then one token at a time with a key/value cache."""

import jax
import jax.numpy as jnp
import numpy as np

from distill.errors import UserError
from distill.models.model import Model
from distill.shapes import Array, Int, Params


def greedy(
    model: Model,
    params: Params,
    prompts: Int[Array, "B L"],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int = 0,
) -> Int[Array, "B T"]:
    """Greedy decoding: the most likely next token until one of ``eos_ids`` or ``max_new_tokens``.

    It stops early when every row has finished.

    Args:
      model: with a cache (``init_cache``).
      params: its parameters.
      prompts: ``[B, L]`` ids, all of the same length, no padding.
      max_new_tokens: T.
      eos_ids: each ends a row and is written (``tokenizer.stop_ids``); none: no row ends early.
      pad_id: fills a row after its end.

    Returns:
      ``[B, T]`` new tokens.

    Raises:
      UserError: the model has no cache, no prompt or nothing to write, or more tokens than learned positions.
    """
    if model.init_cache is None:
        raise UserError("greedy: this model has no key/value cache; expected Model.init_cache.")
    batch, length = prompts.shape
    if length < 1 or max_new_tokens < 1:
        raise UserError(
            f"greedy: prompts of {length} tokens, max_new_tokens={max_new_tokens}; expected at least 1 each."
        )
    prefill = model.apply(params, prompts, cache=model.init_cache(batch, length + max_new_tokens))

    def next_token(hidden_BLD: Array) -> Array:
        return jnp.argmax(model.unembed(params, hidden_BLD[:, -1:])[:, 0], axis=-1).astype(jnp.int32)

    def unfinished(carry) -> Array:
        index, done, *_ = carry
        return (index < max_new_tokens) & ~jnp.all(done)

    def write(carry):
        index, done, token, answer, cache = carry
        token = jnp.where(done, pad_id, token)
        answer = jax.lax.dynamic_update_slice_in_dim(answer, token[:, None], index, axis=1)
        done = done | jnp.isin(token, np.asarray(eos_ids, np.int32))
        output = model.apply(params, token[:, None], cache=cache)
        return index + 1, done, next_token(output.hidden), answer, output.cache

    answer = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    start = (jnp.int32(0), jnp.zeros(batch, bool), next_token(prefill.hidden), answer, prefill.cache)
    return jax.lax.while_loop(unfinished, write, start)[3]
