"""Networks as pure functions: ``init(key)``, ``apply(params, tokens) -> Output``, ``unembed(params, hidden)``."""

from distill.models.adapters import from_linen, from_nnx
from distill.models.config import DecoderConfig, EncoderConfig, RopeScaling
from distill.models.decoder import decoder
from distill.models.encoder import encoder
from distill.models.model import Model
from distill.models.output import Cache, Collect, Output, Relations

__all__ = [
    "Cache",
    "Collect",
    "DecoderConfig",
    "EncoderConfig",
    "Model",
    "Output",
    "Relations",
    "RopeScaling",
    "decoder",
    "encoder",
    "from_linen",
    "from_nnx",
]
