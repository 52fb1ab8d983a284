"""The network of a configuration: its model, the shapes of its parameters, and their names in files of a family."""

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import numpy as np

from distill.models.config import EncoderConfig, NetworkConfig
from distill.models.decoder import decoder
from distill.models.encoder import encoder
from distill.models.model import Model
from distill.shapes import Params
from distill.weights.assemble import disassemble
from distill.weights.families import FAMILIES, family_of
from distill.weights.table import ParameterPath, Shape, Table


def network(config: NetworkConfig) -> Model:
    """The decoder or encoder of a configuration."""
    return encoder(config) if isinstance(config, EncoderConfig) else decoder(config)


@functools.lru_cache(maxsize=8)  # tracing a decoder takes longer than reading a small one
def shapes_of(config: NetworkConfig) -> Mapping[ParameterPath, Shape]:
    """The shape of every parameter of a network; those of layers are stacked, ``[N, ...]``."""
    shapes = jax.eval_shape(network(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return MappingProxyType({tuple(key.key for key in path): leaf.shape for path, leaf in leaves})


def table_of(config: NetworkConfig, family: str | None = None) -> Table:
    """The names of a network's tensors in files of a family, for transformers.

    Args:
      config: the network.
      family: the ``model_type``; None: ``family_of(config)``.

    Raises:
      UserError: a family that is not known or does not have all options of this network.
    """
    row = FAMILIES[family_of(config, family)].row
    return {path: row(config, path) for path in shapes_of(config)}


def tensors(config: NetworkConfig, family: str, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """``(name, array)`` of every tensor of a file that transformers opens as this family."""
    absent = FAMILIES[family].absent(config)
    for name, array in disassemble(shapes_of(config), table_of(config, family), params):
        if name.removeprefix(FAMILIES[family].prefix) not in absent:
            yield name, array
