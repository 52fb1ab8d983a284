"""The task loss: cross-entropy with hard labels."""

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.shapes import Labels, Logits, Nats


def cross_entropy(student_logits: Logits, labels: Labels, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Nats:
    """Cross-entropy −log Q(label), optionally with smoothed labels and a z-loss.

    With ε = ``label_smoothing`` and Z = Σ_v exp(logit_v):  −(1−ε)·log Q_label − (ε/V)·Σ_v log Q_v + z_loss·(log Z)².
    Label smoothing: arXiv 1512.00567. z-loss: PaLM, arXiv 2204.02311 (there 1e-4).

    Args:
      student_logits: ``[..., V]``, any float type, read as float32. With ``label_smoothing`` no logit may be −inf.
      labels: ``[...]`` integers in [0, V). A label outside is NaN: mask such positions before averaging.
      label_smoothing: ε in [0, 1).
      z_loss: weight of (log Z)², ≥ 0.

    Returns:
      ``[...]`` nats, float32.

    Raises:
      UserError: label_smoothing outside [0, 1) or a negative z_loss.

    Example:
      >>> logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
      >>> cross_entropy(logits, jnp.array([0])).round(4)  # −log 0.7
      Array([0.3567], dtype=float32)
    """
    if not (0.0 <= label_smoothing < 1.0 and z_loss >= 0.0):
        raise UserError(
            f"cross_entropy: label_smoothing={label_smoothing}, z_loss={z_loss}; expected label_smoothing in [0, 1) "
            "and z_loss ≥ 0."
        )
    whole = student_logits.astype(jnp.float32)
    high = jax.lax.stop_gradient(jnp.max(whole, axis=-1))
    logits = whole - high[..., None]  # before anything is subtracted, or large logits cost the nats their digits
    log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))  # one of the terms is 1
    index = labels.astype(jnp.int32)  # of eight bits, say, could not hold the number of tokens
    index = jnp.where(index < 0, logits.shape[-1], index)  # a negative label must not wrap round to a real token
    # picked from the logits as they came: from ``logits``, XLA would write all of them down to pick one
    nats = log_z - (_pick(whole, index) - high)
    if label_smoothing:
        nats = (1.0 - label_smoothing) * nats + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
    return nats + z_loss * jnp.square(log_z + high) if z_loss else nats


@jax.custom_jvp
def _pick(x, index):
    """``x[..., index]``, NaN beyond the last token; as a derivative a comparison with every token.

    The derivative of a gather is a scatter, which XLA fuses with nothing: every gradient would be written once more.
    """
    return jnp.take_along_axis(x, index[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]


@_pick.defjvp
def _pick_jvp(primals, tangents):
    x, index = primals
    here = jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index[..., None]
    return _pick(x, index), jnp.sum(jnp.where(here, tangents[0], 0.0), axis=-1)
