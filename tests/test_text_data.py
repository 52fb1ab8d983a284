"""Readers, sides and rows of text: masks, ends of documents, refusals."""

import collections
import datetime
import decimal
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from text_builders import CHAT, CHATML, MARKED, TEXTS, byte_level, tiny_tokenizer, write_lines
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from distill.data import prepared, text
from distill.data.chat import conversation, encode_chat
from distill.data.loader import Loader
from distill.data.packing import Rows, Summary, best_fit, cut, pack
from distill.data.prepared import prepare
from distill.data.readers import Document, Fields, Part, files_of, read
from distill.data.text import Encoded, TextDataConfig, documents, encode
from distill.errors import MissingFile, UserError
from distill.tokenizer import TextTokenizer

TOKENIZER = tiny_tokenizer()
RECORDS = [{"text": f"{one} {i}"} for i in range(12) for one in TEXTS]


def encoded(parts, tokenizer=TOKENIZER, **options):
    (found,) = encode([Document(tuple(Part(*part) for part in parts))], tokenizer, TextDataConfig(**options))
    return found


# ---- readers


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS)
    write_lines(tmp_path / "a.jsonl", RECORDS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=5)
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table, max_chunksize=5)
    (tmp_path / "a.txt").write_text("\n--\n".join(record["text"] for record in RECORDS))
    for name in ("a.jsonl", "a.parquet", "a.arrow", "b.arrow", "a.txt"):
        found = list(read(tmp_path / name, "auto", Fields(), "\n--\n"))
        assert [document.parts for document in found] == [(Part(record["text"], True),) for record in RECORDS]
        assert found[2].where == f"{tmp_path / name}:{5 if name == 'a.txt' else 3}"


def test_records_are_recognised_by_their_fields(tmp_path):
    records = {
        "messages": {"messages": CHAT, "text": "x"},
        "prompt": {"prompt": "p", "completion": "c", "text": "x"},
        "text": {"text": "x"},
    }
    for form, record in records.items():
        (found,) = read(write_lines(tmp_path / "a.jsonl", [record]), "auto", Fields(), "")
        assert bool(found.messages) == (form == "messages")
        assert [part.counts for part in found.parts] == {"messages": [], "prompt": [False, True], "text": [True]}[form]
    fields = Fields(prompt="q", completion="a")
    (found,) = read(write_lines(tmp_path / "a.jsonl", [{"q": "1", "a": "2"}]), "auto", fields, "")
    assert found.parts == (Part("1", False), Part("2", True))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{", "a.jsonl:3: not JSON"),
        (b"\xff", "a.jsonl:3: not JSON"),
        (b"[1]", "a.jsonl:3: a JSON list; expected an object"),
        (b"[" * 9999, "a.jsonl:3: not JSON"),
        (
            b'{"text": ' + b"[" * 400 + b"]" * 400 + b"}",
            "a.jsonl:3: lists or objects inside one another, more than 100",
        ),
        (b"{}", "a.jsonl:3: field 'text' is missing"),
        (b'{"text": 1}', "a.jsonl:3: field 'text' is a int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, error):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=error):
        list(read(path, "auto", Fields()))


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"other": 1}, "a.jsonl:1: fields other; expected 'text'"),
        ({"messages": "x"}, "a.jsonl:1: messages are 'x'; expected a list"),
        ({"messages": []}, "messages are"),
        ({"messages": [{"role": "user"}]}, "message 0 is"),
        ({"messages": CHAT, "tools": "x"}, "field 'tools' is a str"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, error):
    with pytest.raises(ValueError, match=error):
        list(read(write_lines(tmp_path / "a.jsonl", [record]), "auto", Fields()))


def test_other_files_are_refused(tmp_path):
    for name, kind in (("a.parquet", "parquet"), ("a.arrow", "arrow")):
        (tmp_path / name).write_bytes(b"no table at all")
        with pytest.raises(ValueError, match=f"{name}: not readable as {kind}"):
            list(read(tmp_path / name, "auto", Fields()))
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xff")
    with pytest.raises(ValueError, match="a.txt:2: not UTF-8"):
        list(read(tmp_path / "a.txt", "auto", Fields()))
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        files_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="files .csv are not read"):
        files_of(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="no files to read in this folder"):
        files_of(tmp_path / "empty")


def test_splits_of_a_folder_are_chosen_by_name(tmp_path):
    for name in (
        "data/train-00001-of-00002.jsonl",
        "data/train-00000-of-00002.jsonl",
        "data/test-0.jsonl",
        ".x/train.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README.md").touch()
    assert [file.name for file in files_of(tmp_path)] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [file.name for file in files_of(tmp_path, "test")] == ["test-0.jsonl"]
    with pytest.raises(ValueError, match="no files of a split 'dev'; the folder has test, train"):
        files_of(tmp_path, "dev")


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="distill")
    return lambda: [record.getMessage() for record in caplog.records]


def test_files_that_are_left_out_are_named(tmp_path, warned):
    for name in (
        "history.txt",
        "physics.txt",
        "train travel.txt",
        "notes.csv",
        "a.jsonl.gz",
        "README.md",
        ".hidden.csv",
    ):
        (tmp_path / name).write_text("text")
    assert [file.name for file in files_of(tmp_path)] == ["train travel.txt"]
    files_of(tmp_path)
    kinds, splits = warned()  # once, although the folder is read again
    assert "2 files are left out: a.jsonl.gz, notes.csv; files .txt, .md, .jsonl, .parquet, .arrow are read" in kinds
    assert (
        "split 'train' is read, 1 files (train travel.txt …); 2 files are left out: history.txt, physics.txt" in splits
    )


def arrow_file(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"text": texts})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def test_tables_that_map_keeps_beside_a_saved_data_set_are_not_read(tmp_path, warned):
    names = ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow", "train/cache-1f2e3d.arrow"]
    for name in names:
        arrow_file(tmp_path / name, ["one"])
    own = [{"filename": Path(name).name} for name in names[:2]]
    (tmp_path / "train" / "state.json").write_text(json.dumps({"_data_files": own, "_split": "train"}))
    assert [str(file.relative_to(tmp_path)) for file in files_of(tmp_path)] == names[:2]
    (line,) = warned()
    assert "1 files are left out: train/cache-1f2e3d.arrow; state.json does not name them" in line
    (tmp_path / names[1]).unlink()
    with pytest.raises(MissingFile, match="data-00001-of-00002.arrow: missing; state.json names it"):
        files_of(tmp_path)
    (tmp_path / "train" / "state.json").write_text("[]")
    with pytest.raises(UserError, match="state.json: expected the names of the tables"):
        files_of(tmp_path)


def test_links_to_folders_are_followed_each_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "round").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "twice").symlink_to(tmp_path / "elsewhere")
    assert [str(p.relative_to(tmp_path / "texts")) for p in files_of(tmp_path / "texts")] == ["a.txt", "more/b.txt"]


def test_a_split_in_several_folders_is_logged(tmp_path, warned):
    for subset in ("all", "everyday"):
        (tmp_path / "data" / subset).mkdir(parents=True)
        (tmp_path / "data" / subset / "train-00000-of-00001.jsonl").write_text('{"text": "a"}')
    assert len(files_of(tmp_path)) == 2
    (line,) = warned()
    assert "split 'train' is read from 2 folders" in line and "data/all, data/everyday" in line


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = "fox" if name == "a.txt" else '{"text": "fox"}\n{"text": "\\ufefffox"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert {document.text() for document in read(tmp_path / name, "auto", Fields())} == {"fox"}
    for codec in ("utf-16", "utf-16-be"):
        (tmp_path / name).write_bytes(("" if codec == "utf-16" else "\ufeff").encode(codec) + text.encode(codec))
        with pytest.raises(UserError, match=f"{name}:1: UTF-16; expected UTF-8"):
            list(read(tmp_path / name, "auto", Fields()))


def test_half_of_a_surrogate_pair_is_replaced_and_counted(tmp_path):
    left_out = collections.Counter()
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83e\\udd8a"}\n{"text": "a \\ud83d fox"}\n')
    found = list(read(path, "auto", Fields(), "", left_out))
    assert [document.text() for document in found] == ["fine 🦊", "a \ufffd fox"]
    assert +left_out == {"records with half of a surrogate pair, which is read as U+FFFD": 1}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "\ud83d"}]}))
    assert next(iter(read(path, "auto", Fields()))).messages[0]["content"] == "\ufffd"


def test_fields_that_are_not_read_are_counted(tmp_path):
    left_out = collections.Counter()
    records = [{"text": "a", "id": 1, "weight": 0}, {"text": "b", "id": 2, "source": None}]
    assert len(list(read(write_lines(tmp_path / "a.jsonl", records), "auto", Fields(), "", left_out))) == 2
    fields = "records with fields that are not read"
    assert +left_out == {f"{fields} (id, weight)": 1, f"{fields} (id)": 1}


def test_empty_texts_of_records_are_left_out_and_counted(tmp_path):
    left_out = collections.Counter()
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in ("", "one", " \n", "two")])
    assert [document.text() for document in read(file, "auto", Fields(), left_out=left_out)] == ["one", "two"]
    assert left_out["empty documents"] == 2


def test_dates_and_decimals_in_a_conversation_are_named(tmp_path):
    for value in (datetime.datetime(2020, 1, 1), decimal.Decimal("1.5"), b"bytes"):
        table = pyarrow.Table.from_pylist([{"messages": CHAT, "tools": [{"name": "t", "since": value}]}])
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a.parquet:1: .* is not JSON serializable; expected text, numbers"):
            list(read(tmp_path / "a.parquet", "auto", Fields()))


def test_tools_written_as_null_are_none(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": tools} for tools in ("null", "[]", "", None)])
    assert [document.tools for document in read(file, "auto", Fields())] == [()] * 4


def test_keys_that_arrow_adds_are_no_part_of_a_conversation(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "sub", "arguments": {"b": {"c": 2}}}}
    talks = [[CHAT[0], {"role": "assistant", "content": None, "tool_calls": [one]}] for one in (call, other)]
    tools = [[{"function": {"name": "add", "parameters": {"x": 1}}}], [{"function": {"name": "sub", "strict": True}}]]
    records = [{"messages": talk, "tools": tool} for talk, tool in zip(talks, tools, strict=True)]
    table = pyarrow.Table.from_pylist(records)
    assert "None" in str(table.to_pylist())  # what makes this a test
    parquet.write_table(table, tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", records)
    tables, lines = (list(read(tmp_path / f"a.{kind}", "auto", Fields())) for kind in ("parquet", "jsonl"))
    assert [(d.messages, d.tools) for d in tables] == [(d.messages, d.tools) for d in lines]
    write_lines(tmp_path / "a.jsonl", [record | {"tools": json.dumps(record["tools"])} for record in records])
    assert [d.tools for d in read(tmp_path / "a.jsonl", "auto", Fields())] == [d.tools for d in lines]


# ---- tokens of a document


# Fault: prompt tokens are trained; the first EOS does not count because pad == eos.
def test_the_prompt_does_not_count_and_the_end_does():
    assert TOKENIZER.pad_id == TOKENIZER.eos_id
    ids, counts = encoded([("a quick", False), (" fox", True)])
    prompt, completion = TOKENIZER.encode("a quick"), TOKENIZER.encode(" fox")
    assert ids.tolist() == [*prompt, *completion, TOKENIZER.eos_id]
    assert counts.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert encoded([("a quick", False), (" fox", True)], loss="all").counts.all()
    (rows,) = pack([Encoded(ids, counts)], 40, pad_id=TOKENIZER.pad_id)
    batch = rows.batch()
    assert batch.labels[batch.mask].tolist() == [*completion, TOKENIZER.eos_id]  # once, without padding


# Fault: special tokens are lost or doubled.
def test_special_tokens_occur_once():
    starts = tiny_tokenizer(True)
    for parts in ([("fox", True)], [("<s>fox", True)], [("<s>fox</s>", True)]):
        assert encoded(parts, starts).ids.tolist() == [1, *starts.encode("fox"), 2]
    assert encoded([("<s>fox", True)], starts).ids.tolist().count(1) == 1
    inside = encoded([("a<|im_start|>b", True)]).ids.tolist()
    assert inside.count(3) == 1


VOCABULARY = ["<unk>", "<s>", "</s>", *"▁2+=4ab.", "=4", "a▁"]


def prefixing(strip=True):
    """A tokenizer that puts a space before every text, as those of Llama 2 and Mistral do."""
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(VOCABULARY)}, [("=", "4"), ("a", "▁")], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if strip else [])]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return TextTokenizer(backend.to_str(), "</s>")


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("2+2=", "4"), ("2+2=", " 4"), ("a ", "b"), ("a", " b a"), ("", "4")]
)
def test_prompt_and_completion_read_as_their_concatenation(strip, prompt, completion):
    tokenizer = prefixing(strip)
    left_out = collections.Counter()
    document = Document((Part(prompt, False), Part(completion, True)))
    (found,) = encode([document], tokenizer, TextDataConfig(), left_out)
    assert tokenizer.decode(found.ids) == (prompt + completion if strip else f" {prompt}{completion}")
    assert found.ids[~found.counts].tolist() == tokenizer.encode(prompt)  # as at generation
    assert tokenizer.decode(found.ids[found.counts]).strip() == completion.strip()
    assert sum(left_out.values()) == (not strip)


def test_text_that_has_no_tokens_is_counted():
    left_out = collections.Counter()
    found = [Document((Part(text, True),)) for text in ("2+2=4", "2-2=0")]
    list(encode(found, prefixing(), TextDataConfig(), left_out))
    assert sum(left_out.values()) == 1 and "do not decode to" in next(iter(+left_out))


def test_a_document_that_the_tokenizer_fails_over_is_named():
    backend = Tokenizer.from_str(byte_level().to_str())
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    found = [Document((Part(text, True),), where=f"a.txt:{i}") for i, text in enumerate(["fox", "a" * 40 + "!"])]
    with pytest.raises(UserError, match="a.txt:1: the tokenizer fails over"):
        list(encode(found, TextTokenizer(backend.to_str(), "</s>"), TextDataConfig()))


# ---- conversations


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize("starts", [False, True])
def test_turns_of_the_assistant_count(template, starts):
    tokenizer = tiny_tokenizer(starts, chat_template=template)
    ids, counts = encode_chat(tokenizer, CHAT)
    assert tokenizer.decode(ids, special=True) == tokenizer.chat(CHAT)
    assert tokenizer.decode(ids[counts], special=True) == "the lazy dog<|im_end|> brown, 12<|im_end|>"
    assert ids.tolist().count(1) == 1  # the template writes it; none is added
    (whole,) = encode([Document(messages=tuple(CHAT))], tokenizer, TextDataConfig(loss="all"))
    assert whole.counts.all() and whole.ids.tolist() == ids.tolist()


def test_marked_turns_equal_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(True, chat_template=MARKED)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for chat in (CHAT, CHAT[:2], CHAT[:1], [{"role": "system", "content": "dog 🦊"}, *CHAT]):
        want = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        ids, counts = encode_chat(tokenizer, chat)
        assert ids.tolist() == want["input_ids"]
        assert counts.astype(int).tolist() == list(want["assistant_masks"])


def test_every_byte_of_a_turn_counts():
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "🦊"}]
    for template in (CHATML, MARKED):
        ids, counts = encode_chat(tiny_tokenizer(chat_template=template), chat)
        assert TOKENIZER.decode(ids[counts], special=True) == "🦊<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewrites = CHATML.replace("m['content']", "(m['content'] if loop.last else '…')")
    tokenizer = tiny_tokenizer(chat_template=rewrites)
    assert conversation(tokenizer, CHAT[1:2]).turns
    found = [Document(messages=tuple(CHAT), where="a.jsonl:7")]
    with pytest.raises(ValueError, match="a.jsonl:7: message 0: the chat template does not write content 'a quick fox"):
        list(encode(found, tokenizer, TextDataConfig()))
    with pytest.raises(ValueError, match="a.jsonl:7: the tokenizer has no chat template"):
        list(encode(found, TOKENIZER, TextDataConfig()))


# ---- packing


def random_documents(count=60, seed=0, longest=23):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, count)
    return [Encoded(rng.integers(3, 300, n).astype(np.int32), rng.random(n) < 0.8) for n in lengths]


def pieces_of(rows):
    """The documents of rows, unpacked."""
    found = []
    for tokens, counts, segments in zip(*rows, strict=True):
        for i in range(1, segments.max() + 1):
            found.append((tokens[segments == i].tolist(), counts[segments == i].tolist()))
    return sorted(found)


def joined(parts):
    return Rows(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


@pytest.mark.parametrize("window", [7, 1000])
def test_packing_loses_nothing(window):
    found, summary = random_documents(), Summary()
    rows = joined(pack(found, 22, summary=summary, window=window))
    want = [(d.ids.tolist(), [False, *d.counts[1:].tolist()]) for d in found if d.counts[1:].any()]
    assert pieces_of(rows) == sorted(want)
    assert summary.rows == len(rows.tokens) and summary.fill == pytest.approx(rows.fill)
    assert rows.fill > (0.85 if window == 1000 else 0.7)
    assert (summary.documents, summary.counted) == (len(found), rows.counts.sum())
    assert summary.tokens - summary.lost == (rows.segments > 0).sum()


def test_every_token_of_a_long_document_is_predicted_once():
    found = [d._replace(counts=np.ones_like(d.counts)) for d in random_documents(20, longest=90)]
    summary = Summary()
    batch = joined(pack(found, 9, summary=summary)).batch()
    labels = np.sort(batch.labels[batch.mask])
    np.testing.assert_array_equal(labels, np.sort(np.concatenate([d.ids[1:] for d in found])))
    assert summary.lost == 0 and summary.counted == len(labels)


@pytest.mark.parametrize("start", [(), (0,)])
def test_tokens_left_out_are_those_in_no_row(start):
    rng = np.random.default_rng(0)
    for number in range(40):
        size = 40 + number
        ids = np.concatenate([np.zeros(len(start), int), np.arange(1, size)])  # each token once
        counts = rng.random(len(ids)) < 0.05
        counts[-1] = True
        summary = Summary()
        rows = joined(pack([Encoded(ids, counts)], 5, start=start, summary=summary))
        there = np.unique(rows.tokens[rows.segments > 0])
        assert summary.lost == len(np.unique(ids)) - len(there)


@pytest.mark.parametrize("window", [3, 1000])
def test_every_row_and_segment_of_a_tokenizer_with_bos_begins_with_it(window):
    found = [
        Encoded(np.concatenate([[1], d.ids]), np.ones(len(d.ids) + 1, bool)) for d in random_documents(20, longest=90)
    ]
    summary = Summary()
    rows = joined(pack(found, 9, start=(1,), summary=summary, window=window))
    begins = np.diff(np.pad(rows.segments, ((0, 0), (1, 0))), axis=1) != 0
    np.testing.assert_array_equal(rows.tokens[begins & (rows.segments > 0)], 1)
    assert not rows.counts[rows.tokens == 1].any()  # it is never predicted, all others are once
    want = np.sort(np.concatenate([d.ids[1:] for d in found]))
    np.testing.assert_array_equal(np.sort(rows.tokens[rows.counts]), want)
    assert summary.lost == 0 and summary.counted == len(want)
    (whole,) = cut(found[0]._replace(ids=found[0].ids[:5], counts=found[0].counts[:5]), 9, "split", (1,))
    assert whole.ids.tolist() == found[0].ids[:5].tolist()
    without = Encoded(np.arange(5, 12), np.ones(7, bool))  # a template that writes no such token
    assert [piece.ids.tolist() for piece in cut(without, 3, "split", (1,))] == [[5, 6, 7, 8], [8, 9, 10, 11]]
    with pytest.raises(UserError, match="length=1; expected more than the 1 tokens with which a row begins"):
        cut(found[0], 1, "split", (1,))


# Fault: the wrong side is cut.
@pytest.mark.parametrize(
    ("overflow", "start", "want"),
    [("keep_start", (), [0, 1, 2, 3]), ("keep_end", (), [6, 7, 8, 9]), ("keep_end", (0,), [0, 7, 8, 9])],
)
def test_overflow_keeps_the_configured_side(overflow, start, want):
    (kept,) = cut(Encoded(np.arange(10), np.arange(10) % 2 == 0), 3, overflow, start)
    assert kept.ids.tolist() == want and kept.counts.tolist() == [i % 2 == 0 for i in want]


def test_best_fit_equals_a_linear_search():
    sizes = np.random.default_rng(0).integers(1, 17, 200)
    rooms, bins = [], []
    for i in np.argsort(-sizes, kind="stable"):
        fits = [(room, b) for b, room in enumerate(rooms) if room >= sizes[i]]
        if not fits:
            rooms.append(16)
            bins.append([])
        b = min(fits)[1] if fits else len(rooms) - 1
        rooms[b] -= sizes[i]
        bins[b].append(i)
    ours = best_fit(sizes, 16)
    assert sorted(i for b in ours for i in b) == list(range(200)) and all(sizes[b].sum() <= 16 for b in ours)
    assert sorted(16 - sizes[b].sum() for b in ours) == sorted(rooms)


# ---- prepared


def test_data_are_prepared_once_and_split_by_document(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", RECORDS + RECORDS[:5])
    config = TextDataConfig(source=str(path), length=24, heldout_fraction=0.3)
    rows = prepare(config, TOKENIZER, tmp_path / "tfds")
    sides = {side: {d.parts[0].text for d in documents(config, side)} for side in text.SIDES}
    assert not sides["train"] & sides["heldout"]
    assert sides["train"] | sides["heldout"] == {record["text"] for record in RECORDS}
    for side, kept in rows.items():
        want = joined(pack(encode(documents(config, side), TOKENIZER, config), 24, pad_id=TOKENIZER.pad_id))
        for field, other in zip(kept, want, strict=True):
            np.testing.assert_array_equal(field, other)
        assert kept.tokens.dtype == np.uint16 and kept.counts.dtype == bool
        decoded = {TOKENIZER.decode(piece[0]) for piece in pieces_of(kept)}
        assert decoded == sides[side]
    summary = prepared.summaries(config, TOKENIZER, tmp_path / "tfds")["train"]
    assert summary.rows == len(rows["train"].tokens) and summary.fill == pytest.approx(rows["train"].fill)
    assert f"{summary.rows} rows" in str(summary)
    monkeypatch.setattr(text, "encode", None)  # read from disk, not prepared again
    again = prepare(config, TOKENIZER, tmp_path / "tfds")
    np.testing.assert_array_equal(again["train"].tokens, rows["train"].tokens)
    assert Loader(again["train"].batch(), 2, seed=0).batch(3).inputs.shape == (2, 24)


def test_the_fingerprint_follows_the_content_that_is_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    config = TextDataConfig(source=str(path))
    first = prepared.fingerprint(config, TOKENIZER)
    path.rename(tmp_path / "moved").rename(path)
    assert prepared.fingerprint(config, TOKENIZER) == first
    assert prepared.fingerprint(config, tiny_tokenizer(eos="<s>")) != first
    assert prepared.fingerprint(TextDataConfig(source=str(path), length=99), TOKENIZER) != first
    write_lines(path, RECORDS[1:])
    assert prepared.fingerprint(config, TOKENIZER) != first


def test_the_fingerprint_follows_a_file_that_is_held_out_now(tmp_path):
    for name in ("train/a", "train/b", "held/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    config = TextDataConfig(source=str(tmp_path / "train"), heldout_source=str(tmp_path / "held"))
    first = prepared.fingerprint(config, TOKENIZER)
    (tmp_path / "train" / "b.jsonl").rename(tmp_path / "held" / "b.jsonl")
    assert prepared.fingerprint(config, TOKENIZER) != first


def test_a_split_that_a_source_has_not_is_refused(tmp_path):
    file = write_lines(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "texts").mkdir()
    write_lines(tmp_path / "texts" / "a.jsonl", RECORDS)
    for source, message in (
        (file, "one file, no split 'test'"),
        (tmp_path / "texts", "no split 'test': no file is named after a split, such as test-0.jsonl"),
        ("pydoc", "split 'test' of pydoc, which has none"),
    ):
        with pytest.raises(UserError, match=message):
            list(documents(TextDataConfig(source=str(source), heldout_split="test"), "heldout"))
        if source != "pydoc":
            with pytest.raises(UserError, match="no split 'dev'"):
                list(documents(TextDataConfig(source=str(source), split="dev"), "train"))
    write_lines(tmp_path / "dev.jsonl", RECORDS[:3])
    config = TextDataConfig(source=str(tmp_path), split="dev", heldout_source=str(tmp_path / "texts" / "a.jsonl"))
    assert [len(list(documents(config, side))) for side in text.SIDES] == [3, len(RECORDS)]
    assert files_of(write_lines(tmp_path / "my_test.jsonl", RECORDS), "test") == [tmp_path / "my_test.jsonl"]


def test_what_plain_text_and_records_do_not_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    records = write_lines(tmp_path / "b.jsonl", RECORDS)
    for form in ("prompt", "messages"):
        config = TextDataConfig(source=str(tmp_path / "a.txt"), format=form)
        with pytest.raises(UserError, match=f"a.txt: plain text; format='{form}' is of records"):
            list(documents(config, "train"))
    for source in (str(records), "pydoc"):
        with pytest.raises(UserError, match=r"separator='\\n' cuts plain text \(.txt, .md\), and .* has none"):
            prepared.fingerprint(TextDataConfig(source=source, separator="\n"), TOKENIZER)
    left_out = collections.Counter()
    config = TextDataConfig(source=str(tmp_path / "a.txt"), heldout_source=str(records), separator="\\n")
    prepared.fingerprint(config, TOKENIZER)
    assert [d.text() for d in documents(config, "train", left_out)] == ["one two"]
    assert +left_out == {r"files in which the separator '\\n' does not occur: each is one document": 1}


def test_files_that_are_trained_on_and_held_out_are_logged(tmp_path, warned):
    write_lines(tmp_path / "a.jsonl", RECORDS)
    held = write_lines(tmp_path / "b.jsonl", RECORDS)
    prepare(TextDataConfig(source=str(tmp_path), heldout_source=str(held)), TOKENIZER, tmp_path / "tfds")
    assert any("heldout: 1 files are trained on too, such as" in line and str(held) in line for line in warned())


def test_a_side_without_documents_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", RECORDS[:1])
    for fraction, side in ((0.001, "heldout"), (0.999, "train")):
        with pytest.raises(ValueError, match=f"no documents on the side '{side}'"):
            prepare(TextDataConfig(source=str(path), heldout_fraction=fraction), TOKENIZER, tmp_path / "tfds")
    write_lines(path, [{"messages": CHAT[:1]}])
    config = TextDataConfig(source=str(path), heldout_source=str(path))
    with pytest.raises(ValueError, match="nothing to predict in 1 documents of the side 'train'"):
        prepare(config, tiny_tokenizer(chat_template=CHATML), tmp_path / "tfds")
    path.write_text("{")
    with pytest.raises(ValueError, match="a.jsonl:1: not JSON"):
        prepare(config, TOKENIZER, tmp_path / "tfds")


def test_what_is_not_learnt_is_logged_before_training(tmp_path, warned):
    def talk(i, role="assistant", **mark):
        return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": role, "content": "four"} | mark]}

    records = [talk(i, ("gpt", "assistant")[i % 2]) for i in range(20)] + [talk(99, weight=0)]
    path = write_lines(tmp_path / "a.jsonl", [record | {"id": 1} for record in records])
    config = TextDataConfig(source=str(path), heldout_source=str(path), length=24)
    tokenizer = tiny_tokenizer(True, chat_template="{{ strftime_now('%d') }}" + CHATML)
    for _ in range(2):  # logged once; the second time the rows are there
        prepare(config, tokenizer, tmp_path / "tfds")
    lines = [line.partition("train: ")[2] for line in warned() if "train: " in line]
    assert lines[0] == "11 documents have nothing to predict" and "tokens are left out" in lines[1]
    assert set(lines[2:]) == {
        "1 turns of the assistant marked as not to learn (weight, train, …)",
        "10 conversations without a turn of the role 'assistant' (their roles: gpt, user)",
        "21 conversations that the chat template does not begin with the beginning-of-text token",
        "21 conversations whose template writes the date of today; 26 Jul 2024 stands for it",
        "21 records with fields that are not read (id)",
    }
    assert prepared.summaries(config, tokenizer, tmp_path / "tfds")["train"].left_out
    write_lines(path, [talk(i, "gpt") for i in range(9)])
    with pytest.raises(UserError, match=r"nothing to predict in 9 documents .* 9 conversations without .* gpt, user"):
        prepare(config, tiny_tokenizer(chat_template=CHATML), tmp_path / "tfds")


def test_heldout_documents_from_a_separate_source(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    config = TextDataConfig(source=str(tmp_path), heldout_split="test", max_documents=2)
    found = {side: [d.parts[0].text for d in documents(config, side)] for side in text.SIDES}
    assert found == {"train": ["train 0", "train 1"], "heldout": ["test 0", "test 1"]}


def test_pydoc_is_available():
    from pydoc_data.topics import topics

    found = {side: list(documents(TextDataConfig(), side)) for side in text.SIDES}
    assert {d.parts[0].text for side in found.values() for d in side} == set(topics.values())
    assert 2 <= len(found["heldout"]) < len(topics) / 4


def test_chitchat_is_read_as_conversations_and_as_text(tmp_path, monkeypatch):
    from distill import fetch

    lines = [[{"text": "hi"}, {"text": "you"}], [{"text": "hello"}]]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"one": {"messages": lines}}))
    monkeypatch.setattr(fetch, "fetch", lambda which: path)
    config = TextDataConfig(source="chitchat", heldout_source="pydoc")
    (chat,) = documents(config, "train")
    assert [(m["role"], m["content"]) for m in chat.messages] == [("user", "hi\nyou"), ("assistant", "hello")]
    (plain,) = documents(TextDataConfig(source="chitchat", format="text", heldout_source="pydoc"), "train")
    assert plain.parts == (Part("hi\nyou\nhello", True),)


@pytest.mark.parametrize("options", [{"length": 0}, {"max_documents": 0}, {"heldout_fraction": 1.0}], ids=str)
def test_invalid_configurations_are_refused(options):
    with pytest.raises(ValueError, match=f"data: {next(iter(options))}="):
        TextDataConfig(**options)
