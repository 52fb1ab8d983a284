"""``TextTokenizer``: the ids of ``tokenizers`` and transformers, its files, its special tokens."""

import json

import pytest
from builders import random_params, tiny_decoder
from text_builders import CHAT, CHATML, TEXTS, byte_level, tiny_tokenizer
from tokenizers import Tokenizer

from distill.tokenizer import TextTokenizer

PROBES = [*TEXTS, "", "ünï ∑ 🦊\n\n tab\t", "<|im_start|>user<|im_end|> </s>", "<s>already"]


@pytest.mark.parametrize("bos", [False, True])
def test_ids_equal_those_of_tokenizers(bos):
    ours, theirs = tiny_tokenizer(bos), byte_level(bos)
    assert ours.start == ((1,) if bos else ()) and ours.end == ()
    for text in PROBES:
        assert list(ours.start) + ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text), special=True) == text
    assert ours.encode_all(PROBES) == [ours.encode(text) for text in PROBES]
    assert ours.ids() == theirs.get_vocab() and list(ours.ids().values()) == list(range(ours.vocab_size))


def test_special_tokens_have_ids():
    tokenizer = tiny_tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)  # without a pad token the id of eos
    assert tiny_tokenizer(pad="<unk>").pad_id == 0 and tiny_tokenizer(bos=None).bos_id is None
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert tokenizer.decode(tokenizer.encode("<s>fox</s>")) == "fox"


def test_truncation_and_padding_of_a_file_are_ignored():
    from tokenizers import Tokenizer

    cutting = Tokenizer.from_str(byte_level().to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    tokenizer = TextTokenizer(cutting.to_str(), eos="</s>", bos="<s>")
    assert tokenizer.encode(TEXTS[0]) == tiny_tokenizer().encode(TEXTS[0])
    assert tokenizer.fingerprint() == tiny_tokenizer().fingerprint()


@pytest.mark.parametrize("bos", [False, True])
def test_a_saved_folder_is_opened_here_and_by_transformers(tmp_path, bos):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(bos, pad="<unk>", chat_template=CHATML, options={"model_max_length": 77})
    tokenizer.save(tmp_path)
    assert TextTokenizer.from_folder(tmp_path) == tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in PROBES:
        assert theirs(text)["input_ids"] == list(tokenizer.start) + tokenizer.encode(text)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<unk>")
    assert theirs.model_max_length == 77
    assert theirs.apply_chat_template(CHAT, tokenize=False) == tokenizer.chat(CHAT)
    back = TextTokenizer.from_transformers(theirs)
    assert back.encode_all(PROBES) == tokenizer.encode_all(PROBES) and back.chat_template == CHATML
    assert (back.ids(), back.eos, back.start) == (tokenizer.ids(), tokenizer.eos, tokenizer.start)


def test_folders_of_other_tools_are_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    config = {
        "bos_token": "<s>",
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer.from_folder(tmp_path)
    assert (tokenizer.eos, tokenizer.bos, tokenizer.chat_template) == ("</s>", "<s>", "d")
    assert TextTokenizer.from_folder(tmp_path / "tokenizer.json", eos="<|im_end|>").eos == "<|im_end|>"


def test_the_fingerprint_covers_all_that_decides_ids():
    prints = [
        tiny_tokenizer().fingerprint(),
        tiny_tokenizer(True).fingerprint(),
        tiny_tokenizer(eos="<s>").fingerprint(),
    ]
    prints.append(tiny_tokenizer(chat_template=CHATML).fingerprint())
    assert len(set(prints)) == 4 and tiny_tokenizer(options={"x": 1}).fingerprint() == prints[0]


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: missing"):
        TextTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="eos='</t>' is not in its vocabulary"):
        tiny_tokenizer(eos="</t>")
    with pytest.raises(ValueError, match="no tokenizer that the library tokenizers reads"):
        TextTokenizer("{}", eos="a")
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    with pytest.raises(ValueError, match="no file names an end-of-text token"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not readable as JSON"):
        TextTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        tiny_tokenizer().chat(CHAT)
    with pytest.raises(ValueError, match="the chat template fails: no"):
        tiny_tokenizer(chat_template="{{ raise_exception('no') }}").chat(CHAT)
    with pytest.raises(ValueError, match="the chat template fails"):  # refused by the sandbox
        tiny_tokenizer(chat_template="{{ ''.__class__.__mro__ }}").chat(CHAT)


def test_control_tokens_without_a_row_are_ignored():
    """As in Gemma 3: one tokenizer for all models, with an image token for which text models have no row."""
    backend = Tokenizer.from_str(byte_level().to_str())
    backend.add_special_tokens(["<image>"])
    whole, plain = TextTokenizer(backend.to_str(), "</s>"), tiny_tokenizer(bos=None)
    rows = plain.vocab_size
    assert whole.vocab_size == rows + 1 and whole.within(rows + 1) is whole
    assert whole.within(rows).ids() == plain.ids() and max(whole.within(rows).encode("a <image> fox")) < rows
    with pytest.raises(ValueError, match=rf"ids up to {rows}, the embedding {rows - 1} rows, none for '\w+'"):
        whole.within(rows - 1)
    with pytest.raises(ValueError, match="none for '<image>'"):
        TextTokenizer(backend.to_str(), "<image>").within(rows)


def test_a_tokenizer_is_saved_with_a_model(tmp_path):
    import distill

    model = tiny_decoder()
    distill.save(tmp_path, model, random_params(model), tiny_tokenizer(pad="<unk>"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]
    assert TextTokenizer.from_folder(tmp_path) == tiny_tokenizer(pad="<unk>")
