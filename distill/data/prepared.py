"""Prepared text: read, tokenised and packed once, then kept under a hash of everything it depends on.

The rows are a TFDS data set in array_record, written without TensorFlow.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import once, text
from distill.data.packing import Rows, Summary, pack
from distill.data.text import SIDES, Side, TextDataConfig
from distill.errors import UserError
from distill.tokenizer import TextTokenizer

VERSION = "1.2.0"
"""Version of the preparation; data of another version are prepared again."""

log = logging.getLogger(__name__)


def fingerprint(config: TextDataConfig, tokenizer: TextTokenizer) -> str:
    """Hash of the configuration, the tokenizer and all files that are read: equal hashes mean equal rows.

    Raises:
      FileNotFoundError, ValueError: a source that does not exist or is empty.
    """
    values = dataclasses.asdict(config)
    for name in ("source", "heldout_source"):
        if values[name] not in (*text.BUILT_IN, None):
            values[name] = "files"  # identified by the hash of their content: a moved folder stays valid
    parts = [VERSION, values, tokenizer.fingerprint(), text.source_hash(config)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def builder(config: TextDataConfig, tokenizer: TextTokenizer, data_dir: str | Path | None = None) -> Any:
    """The TFDS builder of the rows of both sides; ``download_and_prepare`` writes them if they do not exist yet."""
    import tensorflow_datasets as tfds
    from absl import logging as of_tfds

    of_tfds.set_verbosity(of_tfds.ERROR)  # TFDS warns for each configuration that is made in code
    tfds.disable_progress_bar()
    width = config.length + 1
    # Narrow types halve the files and the memory of the rows.
    narrow = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    types = {"tokens": narrow, "counts": np.uint8, "segments": np.uint16 if width < 2**16 else np.int32}

    class Text(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows of packed documents."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            features = {
                name: tfds.features.Tensor(shape=(width,), dtype=dtype, encoding="bytes")
                for name, dtype in types.items()
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(config=dataclasses.asdict(config)),
                disable_shuffling=True,
            )

        def _split_generators(self, _):
            return {side: self._generate_examples(side) for side in SIDES}

        def _generate_examples(self, side):
            summary, number = Summary(), 0
            read, encoded = collections.Counter[str](), collections.Counter[str]()
            found = text.encode(text.documents(config, side, read), tokenizer, config, encoded)
            options = {"overflow": config.overflow, "pad_id": tokenizer.pad_id, "start": tokenizer.start}
            for rows in pack(found, config.length, summary=summary, **options):
                for row in zip(*rows, strict=True):
                    yield number, {k: field.astype(types[k]) for k, field in zip(types, row, strict=True)}
                    number += 1
            # Both sides read the whole of a source that they share: what it leaves out is counted for one of them.
            left_out = encoded + read if side == "train" or config.separate else +encoded
            summary.left_out = dict(left_out)
            _check_some(summary, config, side)
            self.info.metadata[side] = dataclasses.asdict(summary)

    name = f"{text.file_name(config)}_{fingerprint(config, tokenizer)}"
    return Text(config=tfds.core.BuilderConfig(name=name), data_dir=data_dir, file_format="array_record")


def ready(config: TextDataConfig, tokenizer: TextTokenizer, data_dir: str | Path | None = None) -> Any:
    """The builder with its rows prepared: by process 0, or by each process where they share no folder."""
    made = once.prepared(lambda: builder(config, tokenizer, data_dir))
    lines = [line for side in SIDES for line in _lines(Summary(**made.info.metadata[side]), side)]
    if both := text.shared_files(config):
        lines.append(f"heldout: {len(both)} files are trained on too, such as {both[0]}: measures are of text seen")
    _report(made.builder_config.name, tuple(lines))
    return made


@functools.lru_cache
def _report(name: str, lines: tuple[str, ...]) -> None:
    """Logs, once for each data set, what is not learnt or not learnt as it stands."""
    for line in lines:
        log.warning("%s: %s", name.rpartition("_")[0], line)


def _lines(summary: Summary, side: str) -> list[str]:
    """What preparation left out of a side, a line for each reason."""
    counted = {
        "documents have nothing to predict": summary.empty,
        "tokens are left out: cut off, or of pieces in which no token counts": summary.lost,
    } | dict(sorted(summary.left_out.items()))
    return [f"{side}: {number} {reason}" for reason, number in counted.items() if number]


def _check_some(summary: Summary, config: TextDataConfig, side: str) -> None:
    """Raises UserError if a side has no row."""
    if summary.rows:
        return
    if summary.documents:
        reasons = "; ".join(f"{number} {reason}" for reason, number in summary.left_out.items())
        raise UserError(
            f"{config.source}: nothing to predict in {summary.documents} documents of the side {side!r}; expected a "
            f"completion or a turn of the assistant in some (loss='all' counts every token). {reasons}"
        )
    raise UserError(
        f"{config.source}: no documents on the side {side!r}: the source is empty, or too small for "
        f"heldout_fraction={config.heldout_fraction}. Give more documents (separator cuts one text into several), "
        "another fraction or split_seed, or a heldout_source."
    )


def prepare(
    config: TextDataConfig,
    tokenizer: TextTokenizer,
    data_dir: str | Path | None = None,
    sides: Sequence[Side] = SIDES,
) -> dict[str, Rows]:
    """Loads the rows of both sides, or of one, as arrays; they are prepared on first use.

    Args:
      config: which text, and how it becomes rows.
      tokenizer: the tokenizer that teacher and student share.
      data_dir: where TFDS keeps prepared data; None: its default (``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``).
      sides: those to load; ``stream.py`` reads data that do not fit into memory.

    Returns:
      ``{"train": Rows, "heldout": Rows}``; ``rows.batch()`` is what a ``Loader`` and the step take.

    Raises:
      MissingFile: no such source.
      UserError: what cannot be read, with file and line number; no document on a side.

    Example::

      rows = prepare(TextDataConfig(source="pydoc", length=256), TextTokenizer.from_folder("path/to/model"))
      loader = Loader(rows["train"].batch(), batch_size=32, seed=0)
    """
    prepared, found = ready(config, tokenizer, data_dir), {}
    for side in sides:
        source = prepared.as_data_source(split=side)
        found[side] = as_rows(source.__getitems__(range(len(source))))
    return found


def as_rows(records: list[dict[str, np.ndarray]]) -> Rows:
    """Stacks stored rows into arrays."""
    tokens, counts, segments = (np.stack([record[name] for record in records]) for name in Rows._fields)
    return Rows(tokens, counts.astype(bool), segments)


def summaries(
    config: TextDataConfig, tokenizer: TextTokenizer, data_dir: str | Path | None = None
) -> dict[str, Summary]:
    """Counts of packing for both sides: documents, tokens, rows and their fill."""
    prepared = ready(config, tokenizer, data_dir)
    return {side: Summary(**prepared.info.metadata[side]) for side in SIDES}
