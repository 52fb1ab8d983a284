"""Headers of GGUF files that do not describe their file: refused at once, in little memory."""

import struct

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_gguf import LLAMA, tensors_of, write

import distill
from distill.errors import UserError
from distill.weights.gguf_header import check_header


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file that can be read, and one to write others to."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write(path, LLAMA, "llama", tensors_of(LLAMA), header={"note": "a text", "numbers": [1, 2, 3]})
    check_header(path)
    return path, path.with_name("x.gguf")


def after(data: bytes, name: str) -> int:
    """Where what follows a name in the header begins."""
    packed = struct.pack("<Q", len(name)) + name.encode()
    return data.index(packed) + len(packed)


def offset_of(data: bytes, name: str) -> int:
    """Where the offset of a matrix stands: behind its dimensions, two sizes and its type."""
    return after(data, name) + 4 + 16 + 4


QUERY = "blk.0.attn_q.weight"
CASES = {
    "the offset of another tensor": (offset_of, QUERY, 0, "<Q", 0, "attn_q.weight begins at 0; the one before it ends"),
    "an offset beyond the file": (offset_of, QUERY, 0, "<Q", 2**64 - 32, "begins at 18446744073709551584; the one"),
    "a smaller type": (offset_of, QUERY, -4, "<I", 2, "the one before it ends at"),
    "an unknown type": (offset_of, QUERY, -4, "<I", 77, "has the unknown type 77"),
    "a size of 0": (after, QUERY, 4, "<Q", 0, r"has the shape \(0, "),
    "nine dimensions": (after, QUERY, 0, "<I", 9, "has 9 dimensions; expected at most 4"),
    "2^62 tensors": (None, "", 8, "<Q", 2**62, "tensors: 4611686018427387904 of 24 bytes"),
    "2^62 keys": (None, "", 16, "<Q", 2**62, "keys: 4611686018427387904 of 13 bytes"),
    "version 9": (None, "", 4, "<I", 9, "version 9; expected 2 or 3"),
    "a text of 2^60 bytes": (after, "note", 4, "<Q", 2**60, "bytes of note: 1152921504606846976"),
    "an array of 2^60 numbers": (after, "numbers", 8, "<Q", 2**60, "numbers of numbers: 1152921504606846976"),
    "an array of arrays": (after, "numbers", 4, "<I", 9, "an array of type 9; expected numbers or texts"),
    "2^31 layers": (after, "llama.block_count", 4, "<I", 2**31, "expected a whole number from 1 to 65536"),
    "a third layer": (after, "llama.block_count", 4, "<I", 3, "block_count = 3; it has tensors of 2 layers"),
    "no width": (after, "llama.embedding_length", 4, "<I", 0, "embedding_length = 0; expected a whole number from 1"),
    "heads that do not divide": (after, "llama.attention.head_count", 4, "<I", 5, "no multiple of 5 heads"),
    "an endless theta": (after, "llama.rope.freq_base", 4, "<I", 0x7F800000, "= inf; expected a finite number above 0"),
}
"""What is wrong → where (a name, and bytes behind it), how it is packed, the value, the message."""


@pytest.mark.parametrize("what", CASES)
def test_a_header_that_does_not_describe_the_file_is_refused(good, what):
    (source, path), (place, name, behind, form, value, message) = good, CASES[what]
    data = bytearray(source.read_bytes())
    struct.pack_into(form, data, (place(data, name) if place else 0) + behind, value)
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        distill.load(path)


def test_a_big_endian_file_says_how_it_is_converted(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="big-endian; convert it first: gguf-convert-endian FILE little"):
        distill.load(tmp_path / "big.gguf")


@hypothesis.settings(max_examples=30, deadline=5000)
@hypothesis.given(st.data())
def test_a_damaged_byte_of_the_header_is_refused_or_changes_nothing_but_its_value(good, data):
    """Whatever is written over a few bytes: the file opens, or one message says why not."""
    source, path = good
    content = source.read_bytes()
    end = offset_of(content, "blk.1.ffn_down.weight")
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, end))
        changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        distill.load(path)
    except UserError as error:
        assert str(path) in str(error)
