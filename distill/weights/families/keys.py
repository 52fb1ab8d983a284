"""Keys of ``config.json``: kind and range of each, checked when it is read and kept when it is written."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from distill.errors import UserError, shown

Json = dict[str, Any]

_ABSENT = object()

_NAMES = {"flag": "true or false", "text": "text", "object": "an object"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a key may hold."""

    name: Literal["whole", "number", "flag", "text", "list", "object"]
    least: float = -math.inf
    most: float = math.inf
    """Range of a number; of a list, of its length."""
    above: bool = False
    """``least`` itself is not allowed."""
    null: bool = False
    """null is a value too."""
    of: "Kind | None" = None
    """Kind of the entries of a list."""

    def __str__(self) -> str:
        nothing = ", or null" if self.null else ""
        if self.of is not None:
            return f"a list, each entry {self.of}{nothing}"
        if self.name in _NAMES:
            return _NAMES[self.name] + nothing
        noun = "a whole number" if self.name == "whole" else "a number"
        least, most = f"{self.least:.0f}", f"{self.most:.0f}"
        return f"{noun} {f'above {least} and up' if self.above else f'from {least}'} to {most}{nothing}"

    def read(self, key: str, value: Any) -> Any:
        """The value as an int, float, bool, str, list or dict; a whole float is an int.

        Raises:
          UserError: another kind, or outside the range; it names the key.
        """
        if value is None and self.null:
            return None
        if not self._holds(value):
            raise UserError(f"config.json: {key}={shown(value)}; expected {self}.")
        if self.of is not None:
            return [self.of.read(f"{key}[{n}]", entry) for n, entry in enumerate(value)]
        return {"whole": int, "number": float}.get(self.name, lambda given: given)(value)

    def _holds(self, value: Any) -> bool:
        if self.name in ("whole", "number"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            inside = self.least <= value <= self.most and not (self.above and value == self.least)
            return inside and (self.name == "number" or value == int(value))
        kind = {"flag": bool, "text": str, "list": list, "object": dict}[self.name]
        return isinstance(value, kind) and (self.name != "list" or len(value) <= self.most)


_LENGTH = 2.0**31 - 1
"""Longest text: positions are int32."""
_LAYERS, _HEADS, _WIDTH = 2.0**14, 2.0**16, 2.0**22

FLAG, TEXT, OBJECT = Kind("flag"), Kind("text"), Kind("object", null=True)
POSITIVE = Kind("number", 0.0, 1e12, above=True)
LENGTH = Kind("whole", 1, _LENGTH)
FACTOR = Kind("number", 1.0, 1e6)
MAYBE_POSITIVE, MAYBE_LENGTH = (dataclasses.replace(kind, null=True) for kind in (POSITIVE, LENGTH))


def _sizes(most: float, *names: str, null: bool = False) -> dict[str, Kind]:
    return dict.fromkeys(names, Kind("whole", 1, most, null=null))


KINDS: Mapping[str, Kind] = {
    # sizes: far above every published model, and far below what would exhaust a machine before the files are compared
    **_sizes(2.0**27, "vocab_size"),
    **_sizes(_LAYERS, "num_hidden_layers", "n_layer", "n_layers"),
    **_sizes(_WIDTH, "hidden_size", "n_embd", "dim", "intermediate_size", "hidden_dim", "moe_intermediate_size"),
    **_sizes(_WIDTH, "n_inner", null=True),
    **_sizes(_HEADS, "num_attention_heads", "n_head", "n_heads"),
    **_sizes(_HEADS, "num_key_value_heads", "head_dim", null=True),
    **_sizes(_LENGTH, "max_position_embeddings", "n_positions", "n_ctx", "local_attention"),
    **_sizes(_LENGTH, "original_max_position_embeddings", "sliding_window", null=True),
    **_sizes(_LENGTH, "sliding_window_pattern", "global_attn_every_n_layers", null=True),
    **_sizes(_LENGTH, "no_rope_layer_interval", "decoder_sparse_step", "num_experts_per_tok"),
    "max_window_layers": Kind("whole", 0, _LENGTH),
    "num_experts": Kind("whole", 0, _HEADS, null=True),
    "num_local_experts": Kind("whole", 0, _HEADS, null=True),
    "type_vocab_size": Kind("whole", 0, _HEADS),
    # numbers
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"), POSITIVE),
    **dict.fromkeys(("rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta"), POSITIVE),
    "rope_theta": MAYBE_POSITIVE,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), MAYBE_POSITIVE),
    "query_pre_attn_scalar": LENGTH,
    "rotary_pct": Kind("number", 0.0, 1.0),
    "partial_rotary_factor": Kind("number", 0.0, 1.0, null=True),
    "router_aux_loss_coef": Kind("number", 0.0, 1e6),
    # choices
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"), FLAG),
    **dict.fromkeys(("norm_topk_prob", "use_parallel_residual", "norm_bias", "classifier_bias", "use_cache"), FLAG),
    **dict.fromkeys(("model_type", "dtype", "torch_dtype", "hidden_act", "activation"), TEXT),
    **dict.fromkeys(("activation_function", "classifier_activation"), TEXT),
    "hidden_activation": Kind("text", null=True),
    # of every layer
    "layer_types": Kind("list", most=_LAYERS, null=True, of=TEXT),
    "no_rope_layers": Kind("list", most=_LAYERS, null=True, of=Kind("whole", 0, 1)),
    "mlp_only_layers": Kind("list", most=_LAYERS, null=True, of=Kind("whole", 0, _LAYERS)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
}
"""Key → its kind, for every key that a family reads or writes. transformers refuses a number of the other JSON type."""


class Keys:
    """A ``config.json`` that records which keys were read."""

    def __init__(self, values: Json, defaults: Json):
        self.values, self.defaults, self.seen = values, defaults, {"model_type"}

    def given(self, key: str) -> Any:
        """The value of a key, None where it is absent.

        Raises:
          UserError: a value of another kind or outside its range (``KINDS``).
        """
        self.seen.add(key)
        return KINDS[key].read(key, self.values[key]) if key in self.values else None

    def get(self, key: str) -> Any:
        """The value of a key, or its default.

        Raises:
          UserError: there is neither, or a value of another kind or outside its range (``KINDS``).
        """
        if key in self.values:
            return self.given(key)
        self.seen.add(key)
        if key not in self.defaults:
            raise UserError(f"config.json: {key} is missing.")
        return self.defaults[key]

    def neutral(self, key: str, *values: Any) -> None:
        """Accepts a key only at these values, or absent. Raises UserError for any other."""
        self.seen.add(key)
        value = self.values.get(key, values[0])
        if value not in values:
            raise UserError(f"config.json: {key}={shown(value)} is not supported; expected {values[0]!r}.")


def written(values: Json) -> Json:
    """Values of keys in the JSON types that ``KINDS`` names: 50 of a float is 50.0, 224.0 of an int is 224.

    Example:
      >>> written({"final_logit_softcapping": 50, "query_pre_attn_scalar": 224.0})
      {'final_logit_softcapping': 50.0, 'query_pre_attn_scalar': 224}

    Raises:
      UserError: a value that its key cannot hold.
    """
    return {key: KINDS[key].read(key, value) if key in KINDS else value for key, value in values.items()}
