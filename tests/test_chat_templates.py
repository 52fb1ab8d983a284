"""Chat templates: the text of transformers, the turns of known forms by hand, limits, and what is never passed over."""

import json
import time

import numpy as np
import pytest
from text_builders import CHAT, CHATML, MARKED, tiny_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from distill.data.chat import conversation, encode_chat, tokens_of
from distill.data.messages import KEYS, check_messages, counts
from distill.errors import UserError
from distill.tokenizer import template

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + ARGUMENTS + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<r>') and m.content.endswith('</r>')) %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set reasoning = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}"
    "{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}" + ASK
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}"
    "{{ '<|im_end|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}"
)
R1_LINE = R1.replace("'<|im_end|>' + m", "'<|im_end|>\n' + m")
NOTES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think></think>' }}"
    "{% endif %}{{ m.content }}{% if loop.last and m.role == 'user' %}{{ ' (answer)' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}" + ASK
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": " ab <b>x</b>"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "<r>e</r>"},
    {"role": "assistant", "content": "g\nh"},
]
THINKS = [
    TALK[0],
    {"role": "assistant", "content": "<think>\nold\n</think>\n\ncd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "<think>\nnew\n</think>\n\ngh"},
]


def turns(source, messages=TALK, tools=(), **options):
    found = conversation(tiny_tokenizer(chat_template=source), messages, tools, **options)
    return [found.text[slice(*turn.span)] for turn in found.turns]


# ---- the text


def test_the_text_is_that_of_transformers():
    marked, plain = MARKED.replace("<|im_end|>' }}{% endgen", "' | upper }}{% set x = 'y' %}{% endgen"), CHATML
    sources = [
        plain,
        marked,
        QWEN3,
        "{% for m in messages[::-1] %}{{ m | tojson }}{{ loop.length - loop.index }}{% endfor %}",
    ]
    sources += ["{% macro f(x) %}{{ x ~ x * 2 }}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}"]
    sources += [
        "{% for m in messages recursive %}{% if loop.first %}{% continue %}{% endif %}{{ m['role'] }}{% endfor %}"
    ]
    sources += ["{{ dict(a=1) | tojson }}{{ messages | map(attribute='content') | join(', ') }}{{ '%05d' % 7 }}"]
    for source in sources:
        for answer in (False, True):
            texts, spans = render_jinja_template(
                [TALK],
                chat_template=source,
                add_generation_prompt=answer,
                return_assistant_tokens_mask=source == marked,
                bos_token="<s>",
            )
            ours = template.render(source, TALK, (), answer=answer, bos_token="<s>")
            assert ours.text == texts[0]
            assert source != marked or ours.generated == [tuple(span) for span in spans[0]]


def test_reasoning_reaches_a_template_under_each_of_its_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        message = [{"role": "assistant", "content": "a", name: "why"}]
        text = "{{ messages[0].thinking + messages[0].reasoning_content }}"
        assert tiny_tokenizer(chat_template=text).chat(message) == "whywhy"


def test_the_date_of_a_template_is_fixed():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert tiny_tokenizer(chat_template=source).chat(CHAT) == "26 Jul 2024"
    assert template.writes_date(source) and not template.writes_date(CHATML)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' * 9999999999 }}",
        "{{ 9 ** 99999999 }}",
        "{{ [1] * 999999999 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '%0999999999d' | format(1) }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%.*f' % (999999999, 1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ '{x:{w}}'.format_map({'x': 1, 'w': 999999999}) }}",
        "{{ 7 | center(999999999) }}",
        "{{ (7).to_bytes(999999999, 'big') }}",
        "{{ 7 | round(-999999999) }}",
        "{{ ['a'] | map('center', 999999999) | join }}",
        "{{ {'a': 1} | tojson(indent=999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ ('\n' * 99999) | indent(99999) }}",
        "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
        "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
        "{{ (['a' * 999999] * 99999) | join }}",
        "{{ ''.join(['a' * 999999] * 99999) }}",
        "{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% for i in range(99) %}{{ f(n) if n else '' }}{% endfor %}{% endmacro %}{{ f(3) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for m in messages %}{{ m.content",
        "{{ messages[99].content + 'a' }}",
    ],
)
def test_a_template_that_does_not_end_or_fails_is_an_error(source):
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template fails: "):
        tiny_tokenizer(chat_template=source).chat(CHAT)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ VALUE | string }}",
        "{{ VALUE | tojson }}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(VALUE) }}",
        "{{ nothing | default(VALUE) }}",
        "{{ {}.get('a', VALUE) }}",
        "{{ [{'a': VALUE}] | selectattr('a', 'equalto', VALUE) | map(attribute='a') | first }}",
    ],
)
def test_a_number_that_is_no_length_may_be_large(source):
    source = source.replace("VALUE", "1700000000")
    (theirs,), _ = render_jinja_template([CHAT], chat_template=source)
    assert tiny_tokenizer(chat_template=source).chat(CHAT) == theirs == "1700000000"


def test_the_line_of_a_template_is_named():
    with pytest.raises(UserError, match=r"the chat template fails: no \(its line 3\)"):
        tiny_tokenizer(chat_template="{% if 1 %}\n\n{{ raise_exception('no') }}{% endif %}").chat(CHAT)


# ---- turns


@pytest.mark.parametrize(
    ("source", "messages", "want"),
    [
        (CHATML, TALK, ["cd<|im_end|>", "g\nh<|im_end|>"]),
        (MARKED, TALK, ["cd<|im_end|>", "g\nh<|im_end|>"]),
        (PHI3, TALK, ["cd<|im_end|>", "g\nh<|im_end|>\n</s>"]),
        (PHI3, TALK[:2] * 2, ["cd<|im_end|>", "cd<|im_end|>\n</s>"]),
        # Qwen 3: reasoning before what follows the last question, empty if there is none
        (QWEN3, TALK, ["<think>\n\n</think>\n\ncd<|im_end|>", "<think>\n\n</think>\n\ng\nh<|im_end|>"]),
        (QWEN3, TALK[:2] * 2, ["cd<|im_end|>", "<think>\n\n</think>\n\ncd<|im_end|>"]),
        (QWEN3, THINKS[2:], ["<think>\nnew\n</think>\n\ngh<|im_end|>"]),
        (R1, TALK, ["cd</s>", "g\nh</s>"]),  # the header of an answer alone has <think>
        (R1_LINE, TALK, ["\ncd</s>", "\ng\nh</s>"]),
        (NOTES, TALK, ["<think></think>cd<|im_end|>", "<think></think>g\nh<|im_end|>"]),  # a note to the last question
        (NOTES, TALK[1:2], ["<think></think>cd<|im_end|>"]),
        (MISTRAL, TALK, [" cd</s>", " g\nh</s>"]),
        (MISTRAL, TALK[1:2], ["cd</s>"]),  # the first message: nothing says what asks for it
        (CHATML, [TALK[0], {"role": "assistant", "content": ""}], ["<|im_end|>"]),
        (CHATML, [{"role": "assistant", "content": "a"}, TALK[0]], ["a<|im_end|>"]),
        (CHATML, [TALK[0], {"role": "assistant", "content": " a "}], [" a <|im_end|>"]),
    ],
)
def test_turns_are_found_as_the_whole_conversation_has_them(source, messages, want):
    assert turns(source, messages) == want


def test_turns_are_those_of_the_same_template_with_marks():
    parts = [
        "a",
        "fox ",
        "<b>",
        "</b>",
        " ",
        "\n",
        "<|im_end|>",
        "</think>",
        "[x]",
        "🦊",
        "assistant",
        "<|im_start|>",
        "'",
    ]
    rng = np.random.default_rng(0)
    plain, marked = (tiny_tokenizer(chat_template=source) for source in (CHATML, MARKED))
    for _ in range(100):
        roles = rng.choice(["user", "assistant", "tool"], rng.integers(1, 6)).tolist()
        talk = [{"role": role, "content": "".join(rng.choice(parts, rng.integers(0, 5)))} for role in roles]
        for ours, want in zip(encode_chat(plain, talk), encode_chat(marked, talk), strict=True):
            np.testing.assert_array_equal(ours, want, err_msg=str(talk))


def test_an_empty_message_that_a_template_leaves_out_is_an_error():
    source = CHATML.replace("{{ '<|im_start|>' + m", "{{ '' if not m['content'] else '<|im_start|>' + m")
    assert turns(source) == ["cd<|im_end|>", "g\nh<|im_end|>"]
    with pytest.raises(UserError, match="message 2: an empty message, whose place"):
        turns(source, [*TALK[:2], {"role": "user", "content": ""}, TALK[3]])


def test_a_text_twice_in_a_conversation_is_two_turns():
    same = [{"role": role, "content": "ab"} for role in ("user", "assistant", "user", "assistant")]
    found = conversation(tiny_tokenizer(chat_template=CHATML), same)
    assert [found.text[: turn.span[0]].count("ab") for turn in found.turns] == [1, 3]


def test_answers_without_an_end_are_counted():
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert turns(plain) == ["assistant: cd\n", "assistant: g\nh\n"]  # nothing asks for an answer
    assert conversation(tiny_tokenizer(chat_template=plain), TALK).endless == 2
    assert conversation(tiny_tokenizer(chat_template=CHATML), TALK).endless == 0


# ---- what a template leaves out


def test_reasoning_that_a_template_drops_is_an_error_or_counted():
    with pytest.raises(UserError, match=r"message 1: the chat template does not write content .*drop_reasoning=True"):
        turns(QWEN3, THINKS)
    assert turns(QWEN3, THINKS, drop_reasoning=True) == ["cd<|im_end|>", "<think>\nnew\n</think>\n\ngh<|im_end|>"]
    named = [TALK[0], TALK[1] | {"reasoning_content": "old"}, {"role": "user", "content": "e"}, TALK[3]]
    with pytest.raises(UserError, match="message 1: the chat template does not write reasoning_content 'old'"):
        turns(QWEN3, named)
    tokenizer = tiny_tokenizer(chat_template=QWEN3)
    assert conversation(tokenizer, named, drop_reasoning=True).dropped == 1
    assert conversation(tokenizer, THINKS[2:], drop_reasoning=True).dropped == 0


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ messages[0].content }}", "message 1: the chat template does not write content 'cd'"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "message 0: .*does not write content ' ab"),
        ("{% for m in messages %}{{ m.content[:1] }}{% endfor %}", "message 0: .*does not write content"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", "private-use character"),
    ],
)
def test_a_text_that_a_template_leaves_out_or_changes_is_an_error(source, error):
    with pytest.raises(UserError, match=error):
        turns(source)


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("arguments", [{"a": 2, "s": 'x"y', "n": {"k": ["v", None, True]}}, {}], ids=str)
@pytest.mark.parametrize(
    "written", ["c.function.arguments | tojson", "c.function.arguments", "(c.function.arguments ~ '')"]
)
def test_arguments_are_written_once_whatever_form_they_have(as_text, arguments, written):
    given = json.dumps(arguments) if as_text else arguments
    call = {"type": "function", "function": {"name": "add", "arguments": given}}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [call, call]}, {"role": "tool", "content": "4"}, TALK[3]]
    one = f"<call>add {json.dumps(arguments)}</call>"
    assert turns(CALLS.replace("ARGUMENTS", written), messages)[0] == f"{one}{one}<|im_end|>"


def test_arguments_written_one_by_one_are_found_and_others_are_an_error():
    each = "c.function.arguments.items() | map('join', '=') | join(';')"
    call = {"function": {"name": "add", "arguments": '{"a": "two", "b": "three"}'}}
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert turns(CALLS.replace("ARGUMENTS", each), messages) == ["<call>add a=two;b=three</call><|im_end|>"]
    for lost in ("''", "c.function.arguments | string | length | string", "c.function.arguments | tojson | tojson"):
        with pytest.raises(UserError, match=r"message 1: .*tool_calls\[0\].function.arguments"):
            turns(CALLS.replace("ARGUMENTS", lost), messages)
    with pytest.raises(UserError, match=r"tool_calls\[0\].function.name, beside its arguments, 'add'"):
        turns(
            CHATML.replace(
                "m['content']", "(m.tool_calls[0].function.arguments | tojson if m.tool_calls else m.content)"
            ),
            messages,
        )
    with pytest.raises(UserError, match="does not write the tool 'add' of 'tools'"):
        turns(CHATML, TALK, [{"type": "function", "function": {"name": "add"}}])


def test_no_word_none_is_written_for_a_call_without_content():
    call = {"function": {"name": "add", "arguments": {}}}
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    source = CALLS.replace("(m.content or '')", "m.content | string").replace(
        "ARGUMENTS", "c.function.arguments | tojson"
    )
    assert turns(source, messages) == ["<call>add {}</call><|im_end|>"]


@pytest.mark.parametrize("given", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("content", ["m.content.strip()", "(m.content if m.content is string else m.content | join)"])
def test_a_template_that_fails_over_no_content_gets_an_empty_one(given, content):
    call = {"function": {"name": "add", "arguments": {"a": 1700000000}}}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [call], **given}]
    source = CALLS.replace("(m.content or '')", content).replace("ARGUMENTS", "c.function.arguments | tojson")
    assert turns(source, messages) == ['<call>add {"a": 1700000000}</call><|im_end|>']


# ---- marks of the data


@pytest.mark.parametrize("source", [CHATML, MARKED, QWEN3], ids=["plain", "marked", "thinks"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss_mask": 0}], ids=str)
def test_turns_marked_as_not_to_learn_do_not_count(source, mark):
    tokenizer = tiny_tokenizer(chat_template=source)
    marked = [TALK[0], TALK[1] | mark, TALK[2], TALK[3] | {"weight": 1}]
    ids, learnt = encode_chat(tokenizer, marked)
    whole, without = encode_chat(tokenizer, TALK)
    assert ids.tolist() == whole.tolist() and learnt.sum() < without.sum()
    assert "cd" not in tokenizer.decode(ids[learnt]) and "g\nh" in tokenizer.decode(ids[learnt])
    _, all_but = tokens_of(tokenizer, conversation(tokenizer, marked), everything=True)
    np.testing.assert_array_equal(all_but, ~(without & ~learnt))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"weight": 0.5}, "message 0: weight is 0.5; expected 0 or 1"),
        ({"train": "no"}, "message 0: train is 'no'; expected 0 or 1"),
        ({"weight": 1, "train": False}, "message 0: {'weight': 1, 'train': False} contradict each other"),
        (
            {"role": "user", "train": True},
            "message 0: {'train': True} of a message of the role 'user'; only turns of the role",
        ),
        ({"refusal": "no"}, f"message 0: key 'refusal' is not known; known are {', '.join(KEYS)}"),
        ({"content": 3}, "message 0 is .*expected 'role' and 'content', both text"),
        ({"content": [{"type": "text", "text": "a"}]}, "message 0 is .*expected 'role' and 'content', both text"),
        ({"reasoning": 3}, "message 0: reasoning is 3; expected text"),
        ({"reasoning": "a", "thinking": "b"}, "message 0: reasoning, thinking differ"),
        ({"tool_calls": {"a": 1}}, "message 0: tool_calls are {'a': 1}; expected a list of objects"),
        (
            {"tool_calls": [{"function": {"arguments": {}}}]},
            "message 0: a tool call is .*expected 'function' with 'name'",
        ),
        ({"content": "a" * 9999, "role": 3}, "message 0 is .{0,90}expected 'role'"),
    ],
    ids=str,
)
def test_messages_that_cannot_be_read_are_named(message, error):
    with pytest.raises(UserError, match=f"f.jsonl:1: {error}"):
        check_messages([{"role": "assistant", "content": "a"} | message], "f.jsonl:1")


def test_other_forms_of_conversations_are_named():
    with pytest.raises(UserError, match="message 0 has the keys 'from' and 'value'; expected 'role'"):
        check_messages([{"from": "human", "value": "a"}], "f.jsonl:1")
    assert check_messages([{"role": "user", "content": "a", "refusal": None}], "f") == (
        {"role": "user", "content": "a"},
    )
    assert counts({"role": "assistant", "content": "a"}) and not counts({"role": "user", "content": "a", "weight": 0})


def test_the_header_of_the_next_turn_does_not_end_an_answer():
    source = (
        "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<|im_end|>') + m.content }}{% endfor %}"
    )
    assert turns(source + "{% if add_generation_prompt %}<|im_end|>{% endif %}") == ["cd", "g\nh"]
