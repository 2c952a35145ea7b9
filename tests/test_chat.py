"""Conversations: which tokens have labels, and which formats of records hold them.

The expected masks are written by hand, as pieces of text with a mark for what is trained.
"""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from chats import (
    CASES,
    CHATML,
    CHATML_PARTS,
    GEMMA,
    GENERATION,
    TURNS,
    conversations,
    tokenizer_with,
)

from skipwise.data import tokenize
from skipwise.data.chat import ChatSpans, encode_conversation
from skipwise.data.chat_records import Conversation, ConversationError, find_conversation
from skipwise.data.readers import BadRecords, parse_sources
from skipwise.data.shards import read_documents, read_shards
from skipwise.data.tokenize import tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.models.separator import Separator, own_separator


def by_hand(tokenizer, parts):
    """Token ids of the joined text, and 1 where a token is of a trained part."""
    text = "".join(part for part, _ in parts)
    trained = np.concatenate([np.full(len(part), mark) for part, mark in parts])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [int(trained[a]) for a, _ in encoded["offset_mapping"]]


@pytest.mark.parametrize("name", CASES)
def test_the_labels_of_five_templates_are_those_made_by_hand(name):
    template, turns, parts = CASES[name]
    tokenizer = tokenizer_with(template)
    found = encode_conversation(tokenizer, find_conversation({"messages": turns}))
    ids, trained = by_hand(tokenizer, parts)
    assert found.tolist() == ids
    assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert (~found.masked).astype(int).tolist() == trained


RECORDS = {
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"])}
            | {"value": t["content"]}
            for t in TURNS
        ]
    },
    "sharegpt with a system field": {
        "system": "Be short.",
        "conversations": [{"from": t["role"], "value": t["content"]} for t in TURNS[1:]],
    },
    "parts": {
        "messages": [
            {"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in TURNS
        ]
    },
    "prompt and completion": {"prompt": TURNS[:4], "completion": TURNS[4:]},
}


@pytest.mark.parametrize("name", RECORDS)
def test_other_record_formats_give_the_same_tokens(name):
    tokenizer = tokenizer_with(CHATML)
    found = encode_conversation(tokenizer, find_conversation(RECORDS[name]))
    ids, trained = by_hand(tokenizer, CHATML_PARTS)
    assert found.tolist() == ids
    if name == "prompt and completion":  # the answer in the prompt is not trained
        given = [*CHATML_PARTS[:2], ("blue<|im_end|>", 0), *CHATML_PARTS[3:]]
        trained = by_hand(tokenizer, given)[1]
    assert (~found.masked).astype(int).tolist() == trained


def test_an_answer_in_a_prompt_is_not_trained_with_a_generation_block_either():
    found = encode_conversation(
        tokenizer_with(GENERATION), find_conversation(RECORDS["prompt and completion"])
    )
    given = [*CHATML_PARTS[:2], ("blue<|im_end|>", 0), *CHATML_PARTS[3:]]
    assert (~found.masked).astype(int).tolist() == by_hand(tokenizer_with(CHATML), given)[1]


def test_prompts_and_instructions_become_a_turn_of_the_user():
    for record in (
        {"prompt": "Add:\n\n1 2", "completion": "3"},
        {"instruction": "Add:", "input": "1 2", "output": "3"},
        {"instruction": "Add:", "context": "1 2", "response": "3"},
    ):
        conversation = find_conversation(record)
        assert [tuple(m.values()) for m in conversation.messages] == [
            ("user", "Add:\n\n1 2"),
            ("assistant", "3"),
        ]


def test_tools_and_calls_reach_the_template():
    template = """{% for t in tools or [] %}{{ 'tool ' + t.name + '\\n' }}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for c in m.tool_calls or [] %}
{{- 'call ' + c.name }}{% endfor %}{{ m.content or '' }}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    turns = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "12:30"},
        {"role": "assistant", "content": "Half past twelve.", "tool_calls": None},
    ]
    parts = [
        ("tool clock\n<|im_start|>user\nWhat time is it?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("call clock<|im_end|>", 1),
        ("\n<|im_start|>tool\n12:30<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Half past twelve.<|im_end|>", 1),
        ("\n", 0),
    ]
    tokenizer = tokenizer_with(template)
    for tools in ([{"name": "clock"}], '[{"name": "clock"}]'):
        conversation = find_conversation({"messages": turns, "tools": tools})
        found = encode_conversation(tokenizer, conversation)
        ids, trained = by_hand(tokenizer, parts)
        assert found.tolist() == ids
        assert (~found.masked).astype(int).tolist() == trained


THINKING = """{% set last = messages | length - 1 %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}{% set text = m.content.split('</think>')[-1] %}
{%- if m.role == 'assistant' and loop.index0 == last %}
{%- if '</think>' in m.content %}{{ m.content }}{% else %}{{ '<think>\\n\\n</think>\\n\\n' + text }}
{%- endif %}{% elif m.role == 'assistant' %}{{ text | trim }}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
ENDS_ONCE = """{% for m in messages %}{{ '<|head|>' + m.role + '\\n' + m.content + '<|eot|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% else %}{{ eos_token }}
{%- endif %}"""
NO_PROMPT = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|im_end|>\\n' }}{% endfor %}"""


def test_a_template_that_removes_the_reasoning_of_earlier_turns_is_followed():
    thought = "<think>\nhm\n</think>\n\nblue"
    turns = [TURNS[1], {"role": "assistant", "content": thought}, TURNS[3], TURNS[4]]
    parts = [
        ("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n", 0),
        ("blue<|im_end|>", 1),
        ("\n<|im_start|>user\nuser: why\nso?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<think>\n\n</think>\n\nIt is\n\nthe sky.<|im_end|>", 1),
        ("\n", 0),
    ]
    tokenizer = tokenizer_with(THINKING)
    found = encode_conversation(tokenizer, find_conversation({"messages": turns}))
    ids, trained = by_hand(tokenizer, parts)
    assert found.tolist() == ids and (~found.masked).astype(int).tolist() == trained


def test_templates_with_one_end_of_text_or_without_a_generation_prompt_are_followed():
    tokenizer = tokenizer_with(ENDS_ONCE)
    found = encode_conversation(tokenizer, find_conversation({"messages": TURNS[1:]}))
    parts = [
        ("<|head|>user\nName a colour.<|eot|>\n<|head|>assistant\n", 0),
        ("blue<|eot|>", 1),
        ("\n<|head|>user\nuser: why\nso?<|eot|>\n<|head|>assistant\n", 0),
        ("It is\n\nthe sky.<|eot|>\n</s>", 1),
    ]
    ids, trained = by_hand(tokenizer, parts)
    assert found.tolist() == ids and (~found.masked).astype(int).tolist() == trained
    tokenizer = tokenizer_with(NO_PROMPT)
    found = encode_conversation(tokenizer, find_conversation({"messages": TURNS}))
    ids, trained = by_hand(tokenizer, CHATML_PARTS)
    assert found.tolist() == ids and (~found.masked).astype(int).tolist() == trained


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (GEMMA, TURNS, "refuses it: this model takes no system turn"),
        (GEMMA, [TURNS[1], TURNS[3], TURNS[4]], "refuses it: turns must alternate"),
        (  # it writes how many turns there are, so no part is like the whole
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            TURNS,
            "turn 3: the template writes it differently",
        ),
    ],
)
def test_a_conversation_without_findable_answers_is_named_with_its_reason(
    template, turns, said, tmp_path
):
    tokenizer = tokenizer_with(template)
    with pytest.raises(ConversationError, match=said):
        encode_conversation(tokenizer, Conversation(messages=turns))
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": "a text"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    (source,) = parse_sources([str(file)])
    store = tokenize_source(source, tokenizer, cache=tmp_path / "cache")
    assert store.num_documents == 1 and store.num_bad_records == 1
    assert store.bad_records[0].startswith(f"{file}:2: ") and said in store.bad_records[0]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": TURNS[:2]}, "no turn of the assistant; its roles are system, user"),
        ({"messages": []}, "no turn of the assistant; its roles are none"),
        ({"messages": ["hello"]}, "turn 1 has no role"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1 has no text in its content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "turn 1 has a part of type image",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
        ({"prompt": "a", "completion": 5}, "a int in place of a text"),
    ],
)
def test_a_record_that_is_no_whole_conversation_says_what_it_lacks(record, said):
    reason = find_conversation(record)
    assert isinstance(reason, str) and said in reason


def test_a_conversation_without_a_chat_template_says_what_to_do(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TURNS}))
    (source,) = parse_sources([str(tmp_path / "x.jsonl")])
    with pytest.raises(SkipwiseError, match=r"no chat template.*\n.*chat_template\.jinja"):
        tokenize_source(source, tokenizer_with(None), cache=tmp_path / "cache")


def test_the_cache_keeps_labels_and_markers_of_every_conversation(tmp_path, monkeypatch):
    monkeypatch.setattr("skipwise.data.shards._SHARD", 500)
    tokenizer = tokenizer_with(CHATML)
    source, all_turns = conversations(tmp_path)
    stores = [
        tokenize_source(source, tokenizer, cache=tmp_path / "one"),
        tokenize_source(source, tokenizer, cache=tmp_path / "one"),
    ]
    for store in stores:
        labels = total = 0
        for i, turns in enumerate(all_turns):
            whole = encode_conversation(tokenizer, Conversation(messages=turns))
            read = store.document(i)
            assert read.tolist() == whole.tolist()
            assert (read.masked == whole.masked).all()
            assert (read.in_marker == whole.in_marker).all()
            labels, total = labels + int((~whole.masked).sum()), total + len(whole)
        assert store.chat.num_conversations == len(all_turns)
        assert (store.chat.num_labels, store.chat.num_tokens) == (labels, total)
        assert store.digest() == stores[0].digest()


def test_a_shard_of_conversations_comes_back_whole_from_another_process(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    (shard,) = read_shards(conversations(tmp_path, 5)[0])
    separator = own_separator(tokenizer)
    encoder = tokenize._Encoder(tokenizer=tokenizer, separator=separator, special_tokens="control")
    sent = pickle.loads(pickle.dumps(tokenize._encode_shard(encoder, shard)))
    for spans, tokens in zip(
        sent.chat, np.split(sent.tokens, np.cumsum(sent.lengths)), strict=False
    ):
        masked = ChatSpans(masked=spans[0], num_conversations=1)
        text = tokenizer.decode(tokens[~masked.attach(tokens, np.arange(len(tokens))).masked])
        assert text.count("<|im_end|>") >= 1 and "<|im_start|>" not in text


def test_text_beside_conversations_is_trained_in_full_and_max_tokens_ends_at_a_document(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    file = tmp_path / "x.jsonl"
    records = [{"text": "plain text"}, {"messages": TURNS}, {"text": "more"}, {"messages": TURNS}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (source,) = parse_sources([{"path": str(file), "max_tokens": 60}])
    store = tokenize_source(source, tokenizer, cache=tmp_path / "cache")
    assert store.num_documents == 2 and store.chat.num_conversations == 1
    assert not store.document(0).masked.any()
    whole = encode_conversation(tokenizer, Conversation(messages=TURNS))
    assert (store.document(1).masked == whole.masked).all()
    assert store.chat.num_labels == int((~whole.masked).sum())


def test_only_text_gets_a_separator_and_only_its_special_tokens_are_counted(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    file = tmp_path / "x.jsonl"
    records = [{"text": "plain text"}, {"messages": TURNS}, {"text": "so</s>ended"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (source,) = parse_sources([str(file)])
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    separator = Separator(name="eos-bos", begin=(begin,), end=(end,))
    store = tokenize_source(source, tokenizer, separator=separator, cache=tmp_path / "cache")
    for i in (0, 2):
        assert [int(store.document(i)[0]), int(store.document(i)[-1])] == [begin, end]
    ids = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert store.document(1).tolist() == ids
    assert store.num_special == 1


@pytest.mark.parametrize("form", ["array", "wrapped", "object", "csv", "null text", "arrow"])
def test_conversations_are_read_from_every_format_of_records(tmp_path, form):
    pair = {"prompt": "Name a colour.", "completion": "blue"}
    turns = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "blue"},
    ]
    file = tmp_path / {"csv": "x.csv", "null text": "x.jsonl", "arrow": "x.arrow"}.get(
        form, "x.json"
    )
    if form == "csv":
        file.write_text("id,prompt,completion\n1,Name a colour.,blue\n")
    elif form == "arrow":
        table = pyarrow.table({"id": [1], **{name: [value] for name, value in pair.items()}})
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        values = {
            "array": [{"messages": turns}],
            "wrapped": {"version": 1, "data": [{"conversations": turns}]},
            "object": {**pair, "tools": [{"name": "clock"}]},
            "null text": {"text": None, "messages": turns},
        }
        file.write_text(json.dumps(values[form]))
    (source,) = parse_sources([str(file)])
    found = list(read_documents(source, BadRecords(policy="stop")))
    assert [one.messages for one in found] == [turns]


def test_conversations_are_read_from_parquet_with_their_empty_keys_left_out(tmp_path):
    calls = [None, None, [{"name": "x", "arguments": {"a": 1, "b": None}}], None, None]
    turns = [{**t, "tool_calls": c} for t, c in zip(TURNS, calls, strict=True)]
    table = pyarrow.table({"id": [1], "messages": [turns], "system": ["Sys."]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (source,) = parse_sources([str(tmp_path / "x.parquet")])
    writes_calls = CHATML.replace("m.content", "m.content ~ (m.tool_calls or '')")
    store = tokenize_source(source, tokenizer_with(writes_calls), cache=tmp_path / "cache")
    turns = [{"role": "system", "content": "Sys."}, *TURNS]
    turns[3] = {**turns[3], "tool_calls": [{"name": "x", "arguments": {"a": 1}}]}
    whole = encode_conversation(tokenizer_with(writes_calls), Conversation(messages=turns))
    assert store.document(0).tolist() == whole.tolist()
