"""Folders of tokenizers: the ids of AutoTokenizer or an error, chat templates in all their places, stop tokens."""

import json

import pytest
from builders import random_params, tiny_decoder
from text_builders import CHAT, CHATML, byte_level, tiny_tokenizer

import distill
from distill.errors import UserError
from distill.tokenizer import TextTokenizer

BASE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
TEXT = "a quick<|tool|> fox <|im_end|></s> brown<|more|>"
SIZE = 315
CONFIGS = ("generation_config.json", "config.json")
ANSWER = "{{ messages[-1]['content'] }}"


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


def folder(at, **files):
    """A folder with ``tokenizer.json`` and these files; a name's ``__`` is a dot."""
    (at / "tokenizer.json").write_text(byte_level().to_str())
    for name, content in {"tokenizer_config__json": BASE, **files}.items():
        (at / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return at


def theirs(at):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(at)


# ---- the ids of transformers


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": BASE | {"added_tokens_decoder": {str(SIZE): token("<|tool|>", special=True)}}},
        {"tokenizer_config__json": BASE | {"added_tokens_decoder": {str(SIZE): token("<|tool|>", special=False)}}},
        {
            "tokenizer_config__json": BASE
            | {
                "added_tokens_decoder": {
                    str(SIZE + 1): token("<|more|>", special=True, lstrip=True),
                    str(SIZE): token("<|tool|>", special=True, rstrip=True),
                }
            }
        },
        {
            "tokenizer_config__json": BASE
            | {"added_tokens_decoder": {"4": token("<|im_end|>", special=True, lstrip=True)}}
        },
        {"tokenizer_config__json": BASE | {"extra_special_tokens": ["<|tool|>", "<|im_end|>"]}},
        {"tokenizer_config__json": BASE | {"extra_special_tokens": {"tool_token": "<|tool|>"}}},
        {"tokenizer_config__json": BASE | {"additional_special_tokens": ["<|more|>", "<|tool|>"]}},
        {"tokenizer_config__json": BASE | {"tool_token": "<|tool|>", "mask_token": "<|more|>"}},
        {"added_tokens__json": {"<|tool|>": SIZE, "<|more|>": SIZE + 1}},
        {"special_tokens_map__json": {"eos_token": token("</s>"), "pad_token": "<|im_end|>"}},
        {"tokenizer_config__json": BASE | {"eos_token": "Ġfox"}},
        {"tokenizer_config__json": BASE | {"add_bos_token": False, "add_prefix_space": False}},
    ],
    ids=str,
)
def test_ids_are_those_of_transformers(tmp_path, files):
    from transformers import AutoTokenizer

    ours, want = TextTokenizer.from_folder(folder(tmp_path, **files)), theirs(tmp_path)
    assert [*ours.start, *ours.encode(TEXT), *ours.end] == want(TEXT).input_ids
    assert ours.ids() == want.get_vocab()
    assert (ours.eos, ours.bos, ours.pad) == (want.eos_token, want.bos_token, want.pad_token)
    ours.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXT).input_ids == want(TEXT).input_ids
    assert TextTokenizer.from_folder(tmp_path / "saved") == ours


def test_a_folder_that_adds_nothing_keeps_its_file_and_fingerprint(tmp_path):
    declared = {str(i): token(name, special=True) for i, name in enumerate(["<unk>", "<s>", "</s>"])}
    config = BASE | {"added_tokens_decoder": declared, "extra_special_tokens": ["<|im_end|>"]}
    found = TextTokenizer.from_folder(folder(tmp_path, tokenizer_config__json=config))
    assert found.serialized == byte_level().to_str() and found == tiny_tokenizer(unknown="<unk>")
    assert found.fingerprint() == tiny_tokenizer(unknown="<unk>").fingerprint()


def merges():
    return json.loads(byte_level().to_str())["model"]["merges"]


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"tokenizer_config__json": BASE | {"add_bos_token": True}}, "tokenizer_config.json: add_bos_token is true"),
        ({"tokenizer_config__json": BASE | {"add_eos_token": True}}, "add_eos_token is true"),
        ({"tokenizer_config__json": BASE | {"add_prefix_space": True}}, "add_prefix_space is true, .*puts no space"),
        ({"tokenizer_config__json": BASE | {"split_special_tokens": True}}, "split_special_tokens is true"),
        ({"special_tokens_map__json": {"eos_token": "<s>"}}, "eos_token is '</s>' in .* and '<s>' in special_tokens"),
        ({"special_tokens_map__json": {"unk_token": "<s>"}}, "unk_token is '<unk>' in .* and '<s>'"),
        ({"added_tokens__json": {"<|tool|>": 7}}, "added_tokens.json: id 7 is token '<|tool|>', in tokenizer.json "),
        ({"added_tokens__json": {"</s>": 7}}, "added_tokens.json: token '</s>' has the id 7, in tokenizer.json 2"),
        ({"added_tokens__json": {"<|tool|>": 900}}, "token '<|tool|>' has the id 900; .* next free id is 315"),
        (
            {"added_tokens__json": {"<|tool|>": "x"}},
            "added_tokens.json: token '<|tool|>' has the id 'x'; expected a nu",
        ),
        (
            {"tokenizer_config__json": BASE | {"added_tokens_decoder": {"3": token("<|tool|>")}}},
            r"tokenizer_config.json: id 3 is token '<|tool|>', in tokenizer.json '<\|im_start\|>'",
        ),
        ({"tokenizer_config__json": BASE | {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder has 'x': 1"),
        ({"tokenizer_config__json": BASE | {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]"),
        ({"tokenizer_config__json": BASE | {"extra_special_tokens": 7}}, "extra_special_tokens is 7; expected a list"),
        (
            {"tokenizer_config__json": BASE | {"eos_token": 3}},
            "tokenizer_config.json: eos_token is 3; expected a token",
        ),
        ({"tokenizer_config__json": BASE | {"eos_token": ["a"]}}, r"eos_token is \['a'\]; expected a token"),
        ({"tokenizer_config__json": BASE | {"pad_token": {"x": 1}}}, "pad_token is {'x': 1}; expected a token"),
        ({"tokenizer_config__json": BASE | {"pad_token": "<none>"}}, "pad='<none>' is not in its vocabulary"),
        (
            {"tokenizer_config__json": BASE | {"chat_template": 7}},
            "tokenizer_config.json: chat_template is 7; expected",
        ),
        (
            {"tokenizer_config__json": BASE | {"chat_template": [{"x": 1}]}},
            "chat_template is .*expected a text, an obj",
        ),
        ({"tokenizer_config__json": BASE | {"chat_template": [1]}}, r"chat_template is \[1\]"),
        (
            {"generation_config__json": {"eos_token_id": [2, 9999]}},
            "generation_config.json: eos_token_id 9999 is no to",
        ),
        ({"config__json": {"eos_token_id": "2"}}, "config.json: eos_token_id is '2'; expected an id or a list"),
        ({"vocab__json": {"<s>": 3}}, "vocab.json: token '<s>' has the id 3, in tokenizer.json 1"),
        ({"merges__txt": "#version: 0.2\nĠ a\n"}, r"merges.txt: 1 merges, in tokenizer.json \d+; the first that diff"),
        ({"special_tokens_map__json": "[" * 100_000}, "special_tokens_map.json: not readable as JSON"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json: a JSON list; expected an object"),
        ({"tokenizer__json": "{}"}, "tokenizer.json: no tokenizer that the library tokenizers reads"),
        ({"tokenizer__json": '{"model": {}, "added_tokens": [7]}'}, r"tokenizer.json: added_tokens is \[7\]"),
        (
            {"tokenizer__json": {"model": {"type": "WordLevel", "vocab": {"</s>": 4294967295}, "unk_token": "a"}}},
            "token '</s>' has the id 4294967295; expected a number below 2³¹",
        ),
    ],
    ids=str,
)
def test_files_that_disagree_are_named(tmp_path, files, error):
    with pytest.raises(UserError, match=error):
        TextTokenizer.from_folder(folder(tmp_path, **files))


def test_files_that_agree_are_accepted(tmp_path):
    vocabulary = json.loads(byte_level().to_str())["model"]["vocab"]
    lines = "\n".join(["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in merges())])
    at = folder(tmp_path, vocab__json=vocabulary, merges__txt=lines + "\n", added_tokens__json={"</s>": 2})
    assert TextTokenizer.from_folder(at).serialized == byte_level().to_str()
    config = {"eos_token": "</s>", "add_bos_token": True, "bos_token": "<s>"}
    (at / "tokenizer.json").write_text("\ufeff" + byte_level(True).to_str(), encoding="utf-8")
    (at / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer.from_folder(at).start == (1,)
    (at / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert TextTokenizer.from_folder(at, eos="<s>").eos == "<s>"  # the caller's word settles it


def test_a_class_that_transformers_builds_by_other_rules_is_logged(tmp_path, caplog):
    from tokenizers import Tokenizer, models, normalizers

    backend = Tokenizer(models.BPE({"</s>": 0, "▁": 1, "a": 2}, []))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for name, lines in (("LlamaTokenizerFast", 1), ("PreTrainedTokenizerFast", 0)):
        caplog.clear()
        config = {"eos_token": "</s>", "tokenizer_class": name}
        at = folder(tmp_path, tokenizer_config__json=config, tokenizer__json=backend.to_str())
        assert TextTokenizer.from_folder(at).encode("</s>a") == [0, 1, 2]  # transformers 5 with LlamaTokenizer: [0, 2]
        assert len(caplog.records) == lines


def test_a_regular_expression_that_never_ends_is_an_error():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = TextTokenizer(backend.to_str(), "a")
    assert tokenizer.encode("aa") == [0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_all(["a", text])):
        with pytest.raises(UserError, match="the tokenizer fails over 'a.*Regex search error"):
            encode("a" * 40 + "!")


def test_half_of_a_surrogate_pair_is_an_error():
    for encode in (tiny_tokenizer().encode, lambda text: tiny_tokenizer().encode_all(["fine", text])):
        with pytest.raises(UserError, match=r"half of a surrogate pair, U\+D83D, at character 4 \('fox ' before it\)"):
            encode("fox \ud83d")


# ---- chat templates


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": CHATML},
        {"chat_template__json": {"chat_template": CHATML}},
        {"tokenizer_config__json": BASE | {"chat_template": CHATML}},
        {"tokenizer_config__json": BASE | {"chat_template": {"default": CHATML, "rag": "x"}}},
        {"tokenizer_config__json": BASE | {"chat_template": [{"name": "only", "template": CHATML}]}},
        {"tokenizer_config__json": BASE | {"chat_template": CHATML}, "chat_template__jinja": CHATML + "\n"},
    ],
    ids=str,
)
def test_a_chat_template_is_found_wherever_it_stands(tmp_path, files):
    tokenizer = TextTokenizer.from_folder(folder(tmp_path, **files))
    assert tokenizer.chat(CHAT) == tiny_tokenizer(chat_template=CHATML).chat(CHAT)
    tokenizer.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    inside = config["chat_template"]  # for readers that know no chat_template.jinja
    assert CHATML.strip() == (inside if isinstance(inside, str) else inside[0]["template"]).strip()
    assert TextTokenizer.from_folder(tmp_path / "saved") == tokenizer
    assert theirs(tmp_path / "saved").apply_chat_template(CHAT, tokenize=False) == tokenizer.chat(CHAT)


def test_named_templates_are_kept_and_the_one_for_tools_is_used(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    several = {"default": CHATML, "tool_use": ANSWER + "{{ tools | tojson }}", "rag": "r"}
    at = folder(tmp_path, tokenizer_config__json=BASE | {"chat_template": several})
    for place in (at, tmp_path / "saved"):
        tokenizer, other = TextTokenizer.from_folder(place), theirs(place)
        for with_tools in ([], tools):
            want = other.apply_chat_template(CHAT, tools=with_tools or None, tokenize=False)
            assert tokenizer.chat(CHAT, with_tools) == want
        assert TextTokenizer.from_folder(place, template="rag").chat(CHAT) == "r"
        tokenizer.save(tmp_path / "saved")
    assert tokenizer.fingerprint() != tiny_tokenizer(unknown="<unk>", chat_template=CHATML).fingerprint()
    tiny_tokenizer(chat_template=CHATML).save(tmp_path / "saved")  # the names of the first save are gone
    assert not TextTokenizer.from_folder(tmp_path / "saved").templates


def test_templates_that_cannot_be_chosen_are_named(tmp_path):
    at = folder(tmp_path, tokenizer_config__json=BASE | {"chat_template": {"one": "1", "two": "2"}})
    with pytest.raises(UserError, match="chat templates one, two, none called default; choose one: from_folder"):
        TextTokenizer.from_folder(at)
    with pytest.raises(UserError, match="no chat template 'three'; there are: one, two"):
        TextTokenizer.from_folder(at, template="three")
    assert TextTokenizer.from_folder(at, template="two").chat(CHAT) == "2"
    folder(tmp_path, tokenizer_config__json=BASE | {"chat_template": "a"}, chat_template__jinja="b")
    with pytest.raises(
        UserError, match="template in tokenizer_config.json differs from the one in chat_template.jinja"
    ):
        TextTokenizer.from_folder(at)


# ---- stop tokens


def test_the_stop_set_is_the_union_of_what_the_files_and_the_template_end_with(tmp_path):
    assert tiny_tokenizer().stop_ids == (2,)
    assert tiny_tokenizer(chat_template=CHATML).stop_ids == (2, 4)  # a turn ends in <|im_end|>
    assert tiny_tokenizer(chat_template=ANSWER + "{{ eos_token }}").stop_ids == (2,)
    assert tiny_tokenizer(chat_template="{{ raise_exception('no') }}").stop_ids == (2,)
    files = {"generation_config__json": {"eos_token_id": [2, 3]}, "config__json": {"text_config": {"eos_token_id": 0}}}
    found = TextTokenizer.from_folder(folder(tmp_path, **files, chat_template__jinja=CHATML))
    assert found.stop_ids == (0, 2, 3, 4)
    found.save(tmp_path / "saved")
    assert TextTokenizer.from_folder(tmp_path / "saved").stop_ids == (0, 2, 3, 4)
    assert TextTokenizer.from_transformers(theirs(tmp_path)).stop_ids == (2, 4)
    assert found.fingerprint() == tiny_tokenizer(unknown="<unk>", chat_template=CHATML).fingerprint()
    assert tiny_tokenizer(stops=("<s>",)).within(SIZE).stop_ids == (1, 2)
    with pytest.raises(UserError, match="stops='<x>' is not in its vocabulary"):
        tiny_tokenizer(stops=("<x>",))


def test_a_saved_model_stops_where_its_teacher_did(tmp_path):
    from transformers import GenerationConfig

    model = tiny_decoder(vocab_size=SIZE)
    params = random_params(model)
    distill.save(
        tmp_path / "a", model, params, tiny_tokenizer(chat_template=CHATML, pad="<unk>", stops=("<|im_start|>",))
    )
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    distill.save(tmp_path / "b", model, params, tmp_path / "a")  # the files of a folder are copied
    distill.save(tmp_path / "c", model, params, theirs(tmp_path / "b"))  # of transformers, which knows eos alone
    found = [json.loads((tmp_path / at / name).read_text()) for at in "bc" for name in CONFIGS]
    assert [values["eos_token_id"] for values in found] == [[2, 3, 4], [2, 3, 4], [2, 4], [2, 4]]
    assert found[0]["temperature"] == 0.5
    for at in (tmp_path / "b",):
        read = GenerationConfig.from_pretrained(at)
        assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, [2, 3, 4], 0)
        assert json.loads((at / "config.json").read_text())["eos_token_id"] == [2, 3, 4]
        assert TextTokenizer.from_folder(at).stop_ids == (2, 3, 4)
    distill.save(tmp_path / "a", model, params, tiny_tokenizer())  # over it: nothing of the first save is left
    assert TextTokenizer.from_folder(tmp_path / "a").stop_ids == (2,)
    assert not (tmp_path / "a" / "chat_template.jinja").exists()
