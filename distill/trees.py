"""Nested dicts of parameters: joined, flattened to paths, and nested again."""

from typing import Any

from distill.errors import UserError
from distill.shapes import Params

Keys = tuple[str, ...]
"""Path to a leaf: the names of the nested dicts on the way."""


def joined(frozen: Params, learnt: Params) -> Params:
    """Two nested dicts as one.

    Raises:
      UserError: a parameter that stands in both.

    Example:
      >>> joined({"up": {"kernel": 1}}, {"up": {"lora_left": 2}, "norm": 3})
      {'up': {'kernel': 1, 'lora_left': 2}, 'norm': 3}
    """
    result = dict(frozen)
    for name, value in learnt.items():
        if name in result:
            if not (isinstance(value, dict) and isinstance(result[name], dict)):
                raise UserError(f"joined: the parameter {name} is both frozen and learnt.")
            value = joined(result[name], value)
        result[name] = value
    return result


def flat(tree: Params, path: Keys = ()) -> dict[Keys, Any]:
    """Path → leaf."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
    return leaves


def nested(leaves: dict[Keys, Any]) -> Params:
    """The nested dict that ``flat`` took apart."""
    tree: Params = {}
    for path, value in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def get(tree: Params, path: Keys) -> Any:
    """The leaf, or the subtree, at a path."""
    for name in path:
        tree = tree[name]
    return tree
