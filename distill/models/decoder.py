"""The decoder: embedding, a scan over stacked layers, final norm, head."""

import dataclasses

import flax.linen as nn
import jax
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
from distill.models.rope import BY_LENGTH, Turns, lengths_of, turns_of
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
        seen = None if cache is None else _written(cache, tokens_BL, positions_BL, segments_BL)
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
        turns = _turns(self.config, positions_BL, _lengths(self.config, positions_BL, segments_BL, seen))
        shared = Shared(turns, masks, start, segments_BL > 0)
        (x_BLD, kept), (kv, routing) = self.layers((embedded_BLD, kept), shared, Own(kv, slots, kinds))
        hidden_BLD = self.norm(x_BLD)
        if cache is not None:  # a write beyond the last slot would land on earlier tokens
            hidden_BLD = jnp.where(seen.length > segments_BS.shape[1], jnp.nan, hidden_BLD)
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


def _lengths(config: DecoderConfig, positions_BL: Array, segments_BL: Array, seen: Cache | None) -> Array | None:
    """Length of the text of each token, where rotations depend on it; ``seen`` is the cache with these tokens."""
    if config.rope_scaling.kind not in BY_LENGTH:
        return None
    if seen is None:
        return lengths_of(segments_BL, positions_BL, segments_BL)
    return lengths_of(segments_BL, seen.positions_BS, seen.segments_BS)


def _turns(config: DecoderConfig, positions_BL: Array, lengths_BL: Array | None) -> tuple[Turns, ...]:
    """Rotary positions of all layers, and of layers with a window if their theta differs."""
    if config.positions == "learned":
        return ()
    turns = turns_of(config.rotary_size, positions_BL, config.rope_theta, config.rope_scaling, lengths_BL)
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


def _written(cache: Cache, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> Cache:
    """The cache after these tokens, their keys and values aside."""
    length, room = segments_BL.shape[1], cache.segments_BS.shape[1]
    known = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if known + length > room:
        raise UserError(
            f"decoder: {known + length} tokens for a key/value cache with room for {room}; give init_cache the length "
            "of the whole text, prompt and new tokens."
        )
    slots = jnp.arange(room)
    new_BS = ((slots >= cache.length) & (slots < cache.length + length))[None]

    def put(old_BS: Array | None, new_BL: Array) -> Array | None:
        if old_BS is None:
            return None
        placed_BS = jnp.zeros_like(old_BS).at[:, :length].set(new_BL)
        return jnp.where(new_BS, jnp.roll(placed_BS, cache.length, axis=1), old_BS)

    return cache._replace(
        segments_BS=put(cache.segments_BS, segments_BL),
        tokens_BS=put(cache.tokens_BS, tokens_BL),
        positions_BS=put(cache.positions_BS, positions_BL),
        length=cache.length + length,
    )


def _reading_again(model: Model) -> Model:
    """A LongRoPE decoder whose cache is that of the whole text, also where the text outgrows the original length.

    There the long factors replace the short ones in every layer, so that the keys and values of all earlier tokens
    change. They are computed again from their ids, once for each text.
    """
    original = model.config.rope_scaling.original_length

    def apply(params: Params, tokens_BL: Array, *, cache: Cache | None = None, **inputs) -> Output:
        if cache is None:
            return model.apply(params, tokens_BL, **inputs)
        batch, length = tokens_BL.shape
        given = (inputs.get("positions"), inputs.get("segments"))
        usual = (cache.length + jnp.arange(length)[None], jnp.int32(1))
        positions_BL, segments_BL = (
            jnp.broadcast_to(default if value is None else value, (batch, length))
            for value, default in zip(given, usual, strict=True)
        )
        now = _written(cache, tokens_BL, positions_BL, segments_BL)
        longer_BS, longer_now_BS = (
            lengths_of(cache.segments_BS, some.positions_BS, some.segments_BS) > original for some in (cache, now)
        )
        crossed = jnp.any((cache.segments_BS > 0) & (longer_BS != longer_now_BS))

        def read_again() -> Cache:
            empty = cache._replace(segments_BS=jnp.full_like(cache.segments_BS, -1), length=jnp.int32(0))
            text = {"positions": now.positions_BS, "segments": now.segments_BS}
            again = model.apply(params, now.tokens_BS, cache=empty, **text).cache
            return cache._replace(keys_NBGSK=again.keys_NBGSK, values_NBGSK=again.values_NBGSK)

        cache = jax.lax.cond(crossed, read_again, lambda: cache)
        return model.apply(params, tokens_BL, cache=cache, **inputs)

    return dataclasses.replace(model, apply=apply)


def decoder(config: DecoderConfig) -> Model:
    """The pure functions of a decoder with this configuration."""

    def init_cache(batch: int, length: int) -> Cache:
        _check_length(config, length)
        shape = (config.layers, batch, config.groups, length, config.key_size)
        zeros = jnp.zeros(shape, config.dtype)
        cache = Cache(zeros, zeros, jnp.full((batch, length), -1, jnp.int32), jnp.int32(0))
        if config.rope_scaling.kind not in BY_LENGTH:
            return cache
        numbers = jnp.zeros((batch, length), jnp.int32)
        return cache._replace(tokens_BS=numbers, positions_BS=numbers)

    def head(params: Params) -> Head:
        return _head(config, params["embedding"].T if config.tied else params["head"])

    model = from_linen(Decoder(config), config.vocab_size, config=config, init_cache=init_cache, head=head)
    return _reading_again(model) if config.rope_scaling.kind == "longrope" else model
