"""The decoder: embedding, a scan over stacked layers, final norm, head."""

import flax.linen as nn
import jax.numpy as jnp

from distill.devices import backend
from distill.errors import UserError
from distill.head import Head
from distill.models.adapters import from_linen
from distill.models.collect import collected, empty, slots_of
from distill.models.config import DecoderConfig
from distill.models.layers import Block, Norm, Own, Shared
from distill.models.model import Model
from distill.models.output import Cache, Collect, Output
from distill.models.parameters import parameter, rematerialized
from distill.models.placement import rows_apart
from distill.models.rope import Turns, turns_of
from distill.shapes import Array, Params


class Decoder(nn.Module):
    """A decoder in Linen. Use it through ``decoder(config)``."""

    config: DecoderConfig
    remat: str = "none"
    """One of ``REMAT``: what a layer does not keep is recomputed in the backward pass."""

    def setup(self):
        c = self.config
        table = (c.vocab_size, c.width)
        self.embedding = self.param(
            "embedding", parameter(("vocab", "embed"), std=c.width**-0.5 if c.tied else 1.0), table
        )
        if c.positions == "learned":
            rows = (c.max_length, c.width)
            self.position = self.param("position", parameter(("position", "embed"), std=c.width**-0.5), rows)
        if not c.tied:
            self.head = self.param("head", parameter(("embed", "vocab"), std=c.width**-0.5), table[::-1])
        self.layers = nn.scan(
            rematerialized(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.layers,
            unroll=backend.unroll(c.layers, self.remat),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = Norm(c)

    def __call__(
        self,
        tokens_BL: Array,
        positions=None,
        segments=None,
        cache: Cache | None = None,
        collect: Collect | None = None,
    ) -> Output:
        batch, length = tokens_BL.shape
        if positions is None:
            _check_length(self.config, length)
        start = jnp.int32(0) if cache is None else cache.length
        slots_L = start + jnp.arange(length)
        positions_BL = jnp.broadcast_to(slots_L, (batch, length)) if positions is None else positions
        segments_BL = jnp.ones((batch, length), jnp.int32) if segments is None else segments
        seen = _write_segments(cache, segments_BL)
        segments_BS = segments_BL if seen is None else seen.segments_BS
        earlier_LS = jnp.arange(segments_BS.shape[1])[None, :] <= slots_L[:, None]
        mask_BLS = earlier_LS[None] & (segments_BL[:, :, None] == segments_BS[:, None, :])
        masks, kinds = _by_layer(self.config, mask_BLS, slots_L)

        embedded_BLD = self._embed(tokens_BL, positions_BL)
        kv = None if cache is None else (cache.keys_NBGSK, cache.values_NBGSK)
        kept = slots = None
        if collect is not None:
            collect.check(self.config.layers)
            kept = empty(self.config, collect, batch, length, segments_BS.shape[1])
            slots = slots_of(collect, self.config.layers)
        shared = Shared(_turns(self.config, positions_BL), masks, start, segments_BL > 0)
        (x_BLD, kept), (kv, routing) = self.layers((embedded_BLD, kept), shared, Own(kv, slots, kinds))
        hidden_BLD = self.norm(x_BLD)
        if self.is_initializing():
            self.unembed(hidden_BLD)
        return Output(
            hidden_BLD,
            None if seen is None else seen._replace(keys_NBGSK=kv[0], values_NBGSK=kv[1]),
            None if collect is None else collected(collect, self.config.layers, kept, embedded_BLD, x_BLD),
            routing,
        )

    def _embed(self, tokens_BL: Array, positions_BL: Array) -> Array:
        c = self.config
        x_BLD = rows_apart(self.embedding.astype(c.dtype)[tokens_BL])
        x_BLD = x_BLD * jnp.asarray(c.width**0.5, c.dtype) if c.scaled_embedding else x_BLD
        if c.positions == "rotary":
            return x_BLD
        # NaN beyond the table, so that a text that is too long is noticed; the default would repeat the last row.
        return x_BLD + self.position.astype(c.dtype).at[positions_BL].get(mode="fill", fill_value=jnp.nan)

    def unembed(self, hidden_BLD: Array) -> Array:
        """Logits ``[..., V]``; the matmul accumulates in float32."""
        head = _head(self.config, self.embedding.T if self.config.tied else self.head)
        rows = hidden_BLD.reshape(-1, self.config.width) if backend.flatten_rows() else hidden_BLD
        return head.logits(rows).reshape(*hidden_BLD.shape[:-1], -1)


def _head(config: DecoderConfig, kernel: Array) -> Head:
    return Head(kernel, softcap=config.logit_softcap)


def _check_length(config: DecoderConfig, length: int) -> None:
    if config.positions == "learned" and length > config.max_length:
        raise UserError(f"decoder: a text of {length} tokens; expected at most {config.max_length} learned positions.")


def _turns(config: DecoderConfig, positions_BL: Array) -> tuple[Turns, ...]:
    """Rotary positions of all layers, and of layers with a window if their theta differs."""
    if config.positions == "learned":
        return ()
    turns = turns_of(config.rotary_size, positions_BL, config.rope_theta, config.rope_scaling)
    if config.rope_theta_local is None:
        return (turns,)
    return turns, turns_of(config.rotary_size, positions_BL, config.rope_theta_local)


def _by_layer(config: DecoderConfig, mask_BLS: Array, slots_L: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """The masks layers choose from, and what differs between layers: arrays ``[N]`` of bools by name."""
    masks, kinds = (mask_BLS,), {}
    if config.rope_layers:
        kinds["rope"] = jnp.asarray(config.rope_layers)
    if config.sliding_window is not None:
        near_LS = slots_L[:, None] - jnp.arange(mask_BLS.shape[2])[None, :] < config.sliding_window
        masks = (mask_BLS & near_LS[None],)
        if config.window_layers:
            masks, kinds["window"] = (mask_BLS, *masks), jnp.asarray(config.window_layers)
    return masks, kinds


def _write_segments(cache: Cache | None, segments_BL: Array) -> Cache | None:
    if cache is None:
        return None
    written = jnp.zeros_like(cache.segments_BS).at[:, : segments_BL.shape[1]].set(segments_BL)
    slots = jnp.arange(cache.segments_BS.shape[1])
    new = (slots >= cache.length) & (slots < cache.length + segments_BL.shape[1])
    segments_BS = jnp.where(new[None], jnp.roll(written, cache.length, axis=1), cache.segments_BS)
    return cache._replace(segments_BS=segments_BS, length=cache.length + segments_BL.shape[1])


def decoder(config: DecoderConfig) -> Model:
    """The pure functions of a decoder with this configuration."""

    def init_cache(batch: int, length: int) -> Cache:
        _check_length(config, length)
        shape = (config.layers, batch, config.groups, length, config.key_size)
        zeros = jnp.zeros(shape, config.dtype)
        return Cache(zeros, zeros, jnp.full((batch, length), -1, jnp.int32), jnp.int32(0))

    def head(params: Params) -> Head:
        return _head(config, params["embedding"].T if config.tied else params["head"])

    return from_linen(Decoder(config), config.vocab_size, config=config, init_cache=init_cache, head=head)
