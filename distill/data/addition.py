"""n-digit addition: the running example. ``47+85=`` is answered ``231<eos>``, least significant digit first.

The split is by UNORDERED pair: 47+85 and 85+47 are on the same side, so no test pair was seen in the other order.
A TFDS builder writes the examples once, without TensorFlow; ``load`` reads them through Grain.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.batch import Batch, shift
from distill.data import once
from distill.errors import UserError, check_fields
from distill.tokenizer import CharacterTokenizer

TOKENIZER = CharacterTokenizer("0123456789+=")


VALIDATION = 0.1
"""Share of the held-out pairs on which learning curves are measured and checkpoints chosen; the test has the rest."""


@dataclasses.dataclass(frozen=True)
class AdditionConfig:
    """The additions of the task, their notation, and their split."""

    digits: int = 2
    """Digits of each operand, leading zeros kept (5+7 is 05+07)."""
    reverse: bool = True
    """Answer least significant digit first (the order in which carries arise)."""
    test_fraction: float = 0.5
    """Share of the unordered pairs that no model trains on."""
    max_examples: int = 10_000
    """Upper limit of ordered pairs; where more exist, this many distinct pairs (or one fewer) are drawn."""
    split_seed: int = 0
    """Seed of the draw and of the split."""

    def __post_init__(self):
        check_fields(self, "data")
        if not 1 <= self.digits <= 9:
            raise UserError(f"data: digits={self.digits}; expected 1 to 9.")
        if not 0.0 < self.test_fraction < 1.0:
            raise UserError(f"data: test_fraction={self.test_fraction}; expected a number between 0 and 1.")
        if self.max_examples < 4:
            raise UserError(f"data: max_examples={self.max_examples}; expected at least 4.")

    @property
    def prompt_length(self) -> int:
        """Tokens of ``47+85=``."""
        return 2 * self.digits + 2

    @property
    def answer_length(self) -> int:
        """Tokens of the answer with its ``<eos>``."""
        return self.digits + 2

    def prompt(self, a: int, b: int) -> str:
        """Text of a prompt, such as ``05+07=``."""
        return f"{a:0{self.digits}d}+{b:0{self.digits}d}="

    def answer(self, a: int, b: int) -> str:
        """Text of the answer, such as ``210`` for 5+7 (reversed)."""
        text = f"{a + b:0{self.digits + 1}d}"
        return text[::-1] if self.reverse else text

    def value(self, answer: str) -> str:
        """An answer as people write it: ``231`` → ``132``; leading zeros dropped."""
        text = answer[::-1] if self.reverse else answer
        return text.lstrip("0") or text[-1:]

    def parse(self, prompt: str) -> tuple[int, int]:
        """Parses ``'47+85='`` or ``'5 + 7'`` into its operands. Raises UserError for any other text."""
        parts = prompt.replace(" ", "").removesuffix("=").split("+")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"prompt {prompt!r}; expected two numbers such as 47+85=.")
        a, b = (int(part) for part in parts)
        if max(a, b) >= 10**self.digits:
            raise UserError(f"prompt {prompt!r}; this model adds numbers of at most {self.digits} digits.")
        return a, b


class Examples(NamedTuple):
    """Additions as arrays."""

    tokens: np.ndarray
    """``[examples, prompt + answer]`` ids."""
    carries: np.ndarray
    """``[examples]``: number of carries of the addition."""

    def prompts(self, config: AdditionConfig) -> np.ndarray:
        """``[examples, prompt]`` ids."""
        return self.tokens[:, : config.prompt_length]

    def answers(self, config: AdditionConfig) -> np.ndarray:
        """``[examples, answer]`` ids, ``<eos>`` last."""
        return self.tokens[:, config.prompt_length :]

    def take(self, rows: np.ndarray) -> "Examples":
        """Selects some of the examples."""
        return Examples(self.tokens[rows], self.carries[rows])

    def with_answers(self, config: AdditionConfig, answers: np.ndarray) -> "Examples":
        """Replaces the answers, for instance by a teacher's."""
        return Examples(np.concatenate([self.prompts(config), answers], axis=1), self.carries)

    def batch(self, config: AdditionConfig) -> Batch:
        """All examples as one ``Batch``; only the answer counts, up to and including its first ``<eos>``."""
        answers = self.answers(config)
        finished = np.cumsum(answers == TOKENIZER.eos_id, axis=1) - (answers == TOKENIZER.eos_id)
        counts = np.concatenate([np.zeros_like(self.prompts(config), bool), finished == 0], axis=1)
        return shift(self.tokens, counts)


def pairs(config: AdditionConfig) -> dict[str, np.ndarray]:
    """Operands ``{"train": [n, 2], "test": [m, 2]}``, split by unordered pair.

    Both orders of a pair are on the same side. Doubles (a + a) are split separately, so that the sides have exact
    sizes: 5 000 / 5 000 for two digits.
    """
    rng = np.random.default_rng([config.split_seed, config.digits])
    top = 10**config.digits
    if top * top <= config.max_examples:
        a, b = np.triu_indices(top)
    else:
        a, b = _draw_unordered(rng, top, config.max_examples)
    mixed = np.flatnonzero(a != b), np.flatnonzero(a == b)
    sides: dict[str, list[np.ndarray]] = {"test": [], "train": []}
    # A mixed pair gives two examples and a double one, so each kind is split by itself to keep the sizes exact.
    for group in mixed:
        group = rng.permutation(group)
        cut = round(len(group) * config.test_fraction)
        sides["test"].append(group[:cut])
        sides["train"].append(group[cut:])
    return {side: rng.permutation(_both_orders(a, b, np.concatenate(rows))) for side, rows in sides.items()}


def _draw_unordered(rng: np.random.Generator, top: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws distinct unordered pairs that give ``examples`` ordered pairs, or one fewer."""

    def orders(pairs: np.ndarray) -> np.ndarray:
        return np.where(pairs[:, 0] == pairs[:, 1], 1, 2)

    # Drawing with rejection costs as much as the examples; enumerating 10^18 pairs of nine digits is not possible.
    found = np.empty((0, 2), np.int64)
    while orders(found).sum() < examples:
        draws = np.sort(rng.integers(0, top, (2 * examples, 2)), axis=1)
        found = np.unique(np.concatenate([found, draws]), axis=0)
    found = rng.permutation(found)
    kept = found[np.cumsum(orders(found)) <= examples]
    return kept[:, 0], kept[:, 1]


def _both_orders(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> np.ndarray:
    ordered = np.stack([a[rows], b[rows]], axis=1)
    return np.unique(np.concatenate([ordered, ordered[:, ::-1]]), axis=0)


def count_carries(a: np.ndarray, b: np.ndarray, digits: int) -> np.ndarray:
    """Number of columns that carry when a and b are added by hand.

    Example:
      >>> count_carries(np.array([47, 12, 99]), np.array([85, 34, 1]), 2)
      array([2, 0, 2])
    """
    carries = np.zeros_like(a)
    for column in range(1, digits + 1):
        carries += a % 10**column + b % 10**column >= 10**column
    return carries


def encode(config: AdditionConfig, operands: np.ndarray) -> Examples:
    """Encodes operands ``[n, 2]`` as examples."""
    texts = [(config.prompt(a, b), config.answer(a, b)) for a, b in operands.tolist()]
    rows = [[*TOKENIZER.encode(prompt + answer), TOKENIZER.eos_id] for prompt, answer in texts]
    carries = count_carries(operands[:, 0], operands[:, 1], config.digits)
    return Examples(np.array(rows, np.int32), carries.astype(np.int32))


def _builder(config: AdditionConfig, data_dir: str | Path | None):
    import tensorflow_datasets as tfds
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # TFDS warns for each configuration that is made in code
    tfds.disable_progress_bar()

    class Addition(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """n-digit addition, split by unordered pair."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            width = config.prompt_length + config.answer_length
            row = tfds.features.Tensor(shape=(width,), dtype=np.int32, encoding="bytes")
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"tokens": row, "carries": np.int32}),
                metadata=tfds.core.MetadataDict(dataclasses.asdict(config) | {"symbols": list(TOKENIZER.symbols)}),
                disable_shuffling=True,
            )

        def _split_generators(self, _):
            return {side: self._generate_examples(operands) for side, operands in pairs(config).items()}

        def _generate_examples(self, operands):
            examples = encode(config, operands)
            for i, (tokens, carries) in enumerate(zip(*examples, strict=True)):
                yield i, {"tokens": tokens, "carries": int(carries)}

    # The hash keeps data of different configurations in different folders.
    identity = json.dumps(dataclasses.asdict(config), sort_keys=True)
    name = f"d{config.digits}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return Addition(config=tfds.core.BuilderConfig(name=name), data_dir=data_dir, file_format="array_record")


def load(config: AdditionConfig, data_dir: str | Path | None = None) -> dict[str, Examples]:
    """Loads the examples of both sides; they are prepared on first use.

    Args:
      config: which additions.
      data_dir: where TFDS keeps prepared data; None: its default (``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``).

    Returns:
      ``{"train": Examples, "test": Examples}``, disjoint as unordered pairs (asserted).
    """
    builder, sides = once.prepared(lambda: _builder(config, data_dir)), {}
    for side in ("train", "test"):
        source = builder.as_data_source(split=side)
        everything = source.__getitems__(range(len(source)))  # one read; Grain reads them one by one
        tokens = np.stack([row["tokens"] for row in everything])
        sides[side] = Examples(tokens, np.array([row["carries"] for row in everything], np.int32))
    assert_disjoint(config, sides["train"], sides["test"])
    return sides


def split_heldout(config: AdditionConfig, heldout: Examples) -> dict[str, Examples]:
    """Held-out examples as ``{"validation": …, "test": …}``, split by unordered pair; ``VALIDATION`` says how many.

    Raises:
      UserError: fewer than two pairs.
    """
    pairs = [frozenset(pair) for pair in _operands(config, heldout)]
    distinct = sorted(set(pairs), key=sorted)
    if len(distinct) < 2:
        raise UserError(f"data: {len(distinct)} held-out pair; expected one to validate on and one to test on.")
    order = np.random.default_rng([config.split_seed, config.digits, len(distinct)]).permutation(len(distinct))
    chosen = {distinct[i] for i in order[: max(round(VALIDATION * len(distinct)), 1)]}
    inside = np.array([pair in chosen for pair in pairs])
    return {"validation": heldout.take(inside), "test": heldout.take(~inside)}


def assert_disjoint(config: AdditionConfig, left: Examples, right: Examples) -> None:
    """Raises UserError, with one example, if any unordered pair is in both."""
    seen = {frozenset(pair) for pair in _operands(config, left)}
    shared = [pair for pair in _operands(config, right) if frozenset(pair) in seen]
    if shared:
        a, b = shared[0]
        raise UserError(f"{len(shared)} pairs are on both sides of the split, {a}+{b} for one; expected none.")


def _operands(config: AdditionConfig, examples: Examples) -> list[tuple[int, int]]:
    return [config.parse(TOKENIZER.decode(row)) for row in examples.prompts(config).tolist()]
