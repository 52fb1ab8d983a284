"""Networks as pure functions: ``init(key)``, ``apply(params, tokens) -> Output``, ``unembed(params, hidden)``."""

from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.model import Cache, Model, Output, from_linen, from_nnx

__all__ = ["Cache", "DecoderConfig", "Model", "Output", "decoder", "from_linen", "from_nnx"]
