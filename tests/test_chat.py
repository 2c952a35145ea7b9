"""Conversations: which tokens have labels, where chunks may begin, what is asked in an evaluation.

The expected masks are written by hand, as pieces of text with a mark for what is trained.
"""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import EvalSettings
from skipwise.config.run_folder import open_run
from skipwise.data import tokenize
from skipwise.data.chat import ChatSpans, ChatTokens, encode_conversation
from skipwise.data.chat_records import Conversation, ConversationError, find_conversation
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.readers import BadRecords, parse_sources
from skipwise.data.shards import read_documents, read_shards
from skipwise.data.tokenize import tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.evaluation.run import eval_settings, evaluation_documents
from skipwise.evaluation.tasks import passkey
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.evaluation.tasks.prompts import ChatPrompts, token_ids
from skipwise.evaluation.tasks.ruler import make_samples
from skipwise.models.prepared import prepare_model
from skipwise.models.separator import Separator, own_separator
from skipwise.pipeline import stages
from skipwise.pipeline.choose_separator import choose_separator
from skipwise.pipeline.quickstart import MODEL
from skipwise.pose.samplers import IGNORE_INDEX, FullLength, PoSE, RandPos
from skipwise.training.inputs import check_data, data_metadata, load_training_data

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "user: why\nso?"},
    {"role": "assistant", "content": "It is\n\nthe sky."},
]

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\\n\\n' }}
{{- m.content | trim }}{{ '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}
{{- raise_exception('this model takes no system turn') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}
{%- endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<turn>' + role + '\\n' + m.content | trim + '<end>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""
INST = """{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}
{%- set ns.system = '' %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
GENERATION = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_PARTS = [
    ("<|im_start|>system\nBe short.<|im_end|>\n", 0),
    ("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n", 0),
    ("blue<|im_end|>", 1),
    ("\n<|im_start|>user\nuser: why\nso?<|im_end|>\n<|im_start|>assistant\n", 0),
    ("It is\n\nthe sky.<|im_end|>", 1),
    ("\n", 0),
]
CASES = {  # template, turns, the text by hand with 1 where it is trained
    "chatml": (CHATML, TURNS, CHATML_PARTS),
    "headers": (
        HEADERS,
        TURNS,
        [
            ("<s><|head|>system<|/head|>\n\nBe short.<|eot|>", 0),
            ("<|head|>user<|/head|>\n\nName a colour.<|eot|><|head|>assistant<|/head|>\n\n", 0),
            ("blue<|eot|>", 1),
            ("<|head|>user<|/head|>\n\nuser: why\nso?<|eot|><|head|>assistant<|/head|>\n\n", 0),
            ("It is\n\nthe sky.<|eot|>", 1),
        ],
    ),
    "gemma": (
        GEMMA,
        TURNS[1:],
        [
            ("<s><turn>user\nName a colour.<end>\n<turn>model\n", 0),
            ("blue<end>", 1),
            ("\n<turn>user\nuser: why\nso?<end>\n<turn>model\n", 0),
            ("It is\n\nthe sky.<end>", 1),
            ("\n", 0),
        ],
    ),
    "inst": (
        INST,
        TURNS,
        [
            ("<s>[INST] Be short.\n\nName a colour. [/INST]", 0),
            (" blue</s>", 1),
            ("[INST] user: why\nso? [/INST]", 0),
            (" It is\n\nthe sky.</s>", 1),
        ],
    ),
    "generation": (GENERATION, TURNS, CHATML_PARTS),
}
MARKS = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "<end>")


def tokenizer_with(template, marks=MARKS):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.chat_template = template
    return tokenizer


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


def conversations(folder, count=40, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        turns = []
        for turn in range(2 * int(rng.integers(1, 5))):
            content = " ".join(str(n) for n in rng.integers(0, 99, int(rng.integers(1, 25))))
            turns.append({"role": ("user", "assistant")[turn % 2], "content": content})
        lines.append(json.dumps({"messages": turns}) + "\n")
    file = folder / "chat.jsonl"
    file.write_text("".join(lines))
    return parse_sources([str(file)])[0], [json.loads(line)["messages"] for line in lines]


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
    store = tokenize_source(source, tokenizer_with(CHATML), cache=tmp_path / "cache")
    turns = [{"role": "system", "content": "Sys."}, *TURNS]
    whole = encode_conversation(tokenizer_with(CHATML), Conversation(messages=turns))
    assert store.document(0).tolist() == whole.tolist()


def packed_corpus(tmp_path, tokenizer, L, T):
    source, all_turns = conversations(tmp_path)
    store = tokenize_source(source, tokenizer, cache=tmp_path / "cache")
    corpus = build_corpus([store], [None], min_length=L, target_length=T, short_documents="auto")
    return corpus, store, all_turns


def test_short_conversations_are_packed_whole_and_keep_their_labels(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    corpus, store, _ = packed_corpus(tmp_path, tokenizer, 2000, 2000)
    packed = corpus.document(0, 0)
    whole = [store.document(i) for i in range(store.num_documents)]
    expected = np.concatenate([np.asarray(x) for x in whole])[: len(packed)]
    assert packed.tolist() == expected.tolist()  # no separator: the template ends each
    assert (packed.masked == np.concatenate([x.masked for x in whole])[: len(packed)]).all()
    assert len(packed) in np.cumsum([len(x) for x in whole])
    assert corpus.short_documents == "pack" and corpus.num_short == store.num_documents


def cuts_of(example):
    return [*example.text_starts, *(example.text_starts + example.lengths)[:-1]]


@pytest.mark.parametrize("template", ["chatml", "headers", "gemma", "inst", "generation"])
@pytest.mark.parametrize("content", ["aligned", "uniform", "contiguous"])
def test_no_chunk_begins_or_ends_inside_a_turn_marker(tmp_path, template, content):
    """The text before a cut is whole turns, or a turn's marker and a part of its content."""
    tokenizer = tokenizer_with(CASES[template][0])
    corpus, _, _ = packed_corpus(tmp_path, tokenizer, 64, 512)
    sampler = PoSE(train_length=64, target_length=512, num_chunks=3, content=content)
    dataset = PoSEDataset(corpus, sampler, seed=3, num_examples=60)
    ends = {"headers": "<|eot|>", "gemma": "<end>", "inst": "</s>"}.get(template, "<|im_end|>")
    for k in range(60):
        item, tokens = dataset[k], dataset.document(k)
        for cut in cuts_of(item["example"]):
            rest = tokenizer.decode(tokens[cut : cut + 6])
            before = tokenizer.decode(tokens[max(0, cut - 6) : cut])
            assert not rest.startswith((ends, "\n", "user", "assistant", "model", "<|/head|>"))
            assert not before.endswith(("<|im_start|>", "<|head|>", "<turn>", "user", "model"))
            assert not before.endswith(("assistant", "<|/head|>", "[", "[INST", "[/INST"))


def test_a_cut_is_allowed_at_a_turn_and_in_its_content_and_nowhere_else():
    tokenizer = tokenizer_with(CHATML)
    found = encode_conversation(tokenizer, Conversation(messages=TURNS))
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    starts = [
        a
        for a, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
    ]
    allowed = {at for at in range(len(text)) if text.startswith("<|im_start|>", at)}
    at = 0
    for turn in TURNS:
        at = text.index("\n", text.index("<|im_start|>", at)) + 1
        allowed |= set(range(at, at + len(turn["content"])))
    assert [not x for x in found.in_marker] == [start in allowed for start in starts]


def test_labels_are_the_assistant_tokens_without_the_first_after_a_gap(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    corpus, _, _ = packed_corpus(tmp_path, tokenizer, 64, 512)
    for sampler in (
        PoSE(train_length=64, target_length=512, content="aligned"),
        RandPos(train_length=64, target_length=512),
    ):
        dataset = PoSEDataset(corpus, sampler, seed=1, num_examples=40)
        for k in range(40):
            item, tokens = dataset[k], dataset.document(k)
            example = item["example"]
            expected = []
            for chunk, (n, start) in enumerate(
                zip(example.lengths, example.text_starts, strict=True)
            ):
                for j in range(n):
                    gap = j == 0 and chunk > 0 and example.jumps()[chunk]
                    hidden = tokens.masked[start + j] or gap
                    expected.append(IGNORE_INDEX if hidden else int(tokens[start + j]))
            assert item["labels"].tolist() == expected
            assert any(label != IGNORE_INDEX for label in expected[1:])
            assert type(item["input_ids"]) is np.ndarray


def test_conversations_with_tiny_turns_still_give_examples_with_labels():
    tokenizer = tokenizer_with(HEADERS)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 100
    tokens = encode_conversation(tokenizer, Conversation(messages=turns))
    sampler = PoSE(train_length=64, target_length=256, num_chunks=8, content="aligned")

    class One:
        lengths, shares = [np.array([len(tokens)])], [1.0]

        def document(self, group, row):
            return tokens

    dataset = PoSEDataset(One(), sampler, seed=0, num_examples=20)
    for k in range(5):
        example, item = dataset[k]["example"], dataset[k]
        assert not tokens.in_marker[cuts_of(example)].any()
        assert (item["labels"][1:] != IGNORE_INDEX).any() and len(item["labels"]) == 64


def test_an_example_of_the_full_length_begins_outside_of_a_marker(tmp_path):
    corpus = packed_corpus(tmp_path, tokenizer_with(CHATML), 64, 512)[0].longer(300)
    dataset = PoSEDataset(corpus, FullLength(target_length=300), seed=0, num_examples=30)
    starts = [int(dataset[k]["example"].text_starts[0]) for k in range(30)]
    assert not any(dataset.document(k).in_marker[starts[k]] for k in range(30))
    assert len(set(starts)) > 5


def test_slices_and_copies_of_a_conversation_keep_its_labels():
    whole = encode_conversation(tokenizer_with(CHATML), Conversation(messages=TURNS))
    part = whole[5:30].copy()
    assert isinstance(part, ChatTokens)
    assert part.masked.tolist() == whole.masked[5:30].tolist()
    assert part.astype(np.int64)[3:].masked.tolist() == whole.masked[8:30].tolist()


def test_a_task_asks_through_the_template_and_the_answer_begins_in_the_assistants_turn():
    tokenizer = tokenizer_with(CHATML)
    asked = passkey.prompt("12345", 3, 0.5)
    lines, question = asked.rsplit("\n", 1)
    assert question == "What is the pass key? The pass key is"
    rendered = f"<|im_start|>user\n{lines}\nWhat is the pass key?<|im_end|>\n"
    rendered += "<|im_start|>assistant\nThe pass key is"
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert token_ids(ChatPrompts(tokenizer), asked) == expected
    trials = passkey.passkey_trials(ChatPrompts(tokenizer), 256, num_trials=4, num_depths=2)
    assert len(trials) == 4 and all(200 < trial.reach <= 256 for trial in trials)
    for trial in trials:
        key = tokenizer.decode(trial.input_ids[-trial.num_answer :]).strip()
        assert tokenizer.decode(trial.prompt).endswith("assistant\nThe pass key is")
        assert f"The pass key is {key}. Remember it." in tokenizer.decode(trial.prompt)


@pytest.mark.parametrize("task", ["niah_single_words", "vt", "cwe", "fwe"])
def test_ruler_prompts_fit_their_length_with_the_template(task):
    tokenizer = tokenizer_with(CHATML)
    (trial,) = make_samples(task, ChatPrompts(tokenizer), 1024, num_samples=1)
    text = tokenizer.decode(trial.input_ids)
    assert text.startswith("<|im_start|>user") and trial.reach <= 1024
    turn = text.rpartition("<|im_start|>assistant\n")[2]
    assert turn.startswith("The ") and turn.endswith((" is", " are"))


def random_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def test_perplexity_of_conversations_counts_the_assistants_tokens_alone(tmp_path):
    tokenizer, model = tokenizer_with(CHATML), random_model()
    corpus, _, _ = packed_corpus(tmp_path, tokenizer, 128, 128)
    documents = [corpus.document(0, i) for i in range(6)]
    (row,) = perplexity(model, documents, [64], tokenizer=tokenizer, stride=32, num_windows=1000)
    total = count = 0
    for tokens in documents:
        ids = torch.tensor(np.asarray(tokens, np.int64))
        for end in range(64, len(tokens) + 1, 32):
            with torch.no_grad():
                logits = model(ids[None, end - 64 : end]).logits[0].double().log_softmax(-1)
            for at in range(end - 32, end):
                if not tokens.masked[at]:
                    total -= float(logits[at - (end - 64) - 1, ids[at]])
                    count += 1
    assert row["metric"] == "perplexity" and row["num_samples"] == count
    assert row["value"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert row["low"] < row["value"] < row["high"]
    assert np.mean(row["samples"]) == pytest.approx(np.log(row["value"]), abs=1e-4)
    assert len(row["samples"]) == len(row["documents"]) and set(row["documents"]) == set(range(6))


def test_the_template_is_part_of_what_decides_a_result_and_must_exist():
    tokenizer, model = tokenizer_with(CHATML), random_model()
    settings = EvalSettings(tasks=("passkey",), passkey_samples=2, num_depths=1)
    chat = dataclasses.replace(settings, chat_template=True)
    eval_model = EvalModel(label="m", load=lambda: model, tokenizer=tokenizer)
    keys = set()
    for asked in (settings, chat, dataclasses.replace(settings, chat_template=False)):
        rows = evaluate_model(eval_model, Texts(), [256], asked, progress=False)
        keys.add(rows[0]["key"])
    assert len(keys) == 2
    tokenizer.chat_template = None
    with pytest.raises(SkipwiseError, match=r"no chat template.*\n.*eval.chat_template=false"):
        evaluate_model(eval_model, Texts(), [256], chat, progress=False)


def test_a_run_on_conversations_is_checked_and_keeps_their_labels_for_its_evaluation(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    model = tmp_path / "model"
    random_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    _, all_turns = conversations(tmp_path, 120)
    tree = {
        "model": str(model),
        "target_length": 512,
        "data": {"sources": [str(tmp_path / "chat.jsonl")]},
        "rope": {"type": "yarn"},
    }
    recipe = parse_recipe(tree)
    prepared = prepare_model(recipe)
    run = open_run(tmp_path / "run", recipe, "test")
    data = load_training_data(prepared, run)
    whole = [encode_conversation(tokenizer, Conversation(messages=turns)) for turns in all_turns]
    share = sum(int((~x.masked).sum()) for x in whole) / sum(map(len, whole))
    held_out = evaluation_documents(recipe, prepared.tokenizer, run)
    checks = {check.name: check for check in check_data(prepared, data, held_out)}
    said = f"120 conversations, {share:.0%}".replace("%", " %")
    assert checks["chat"].detail == f"{said} of tokens are the assistant's"
    assert checks["evaluation text"].passed and checks["labels"].passed
    assert held_out and all(isinstance(x, ChatTokens) for x in held_out)
    for document, kept in zip(data.corpus.held_out, held_out, strict=True):
        assert document.tolist() == kept.tolist()
        assert document.masked.tolist() == kept.masked.tolist()
    assert not eval_settings(recipe, run).chat_template
    run.update(data=data_metadata(prepared, data, len(held_out)))
    assert eval_settings(recipe, run).chat_template is True
    off = parse_recipe(tree, ["eval.chat_template=false"])
    assert eval_settings(off, run).chat_template is False
    with pytest.raises(SkipwiseError, match="give auto, true or false"):
        parse_recipe(tree, ["eval.chat_template=2"])
    given = evaluation_documents(recipe, prepared.tokenizer, None, [str(tmp_path / "chat.jsonl")])
    assert all(len(x) >= 512 and isinstance(x, ChatTokens) for x in given)


def test_a_run_on_conversations_measures_no_separator_and_asks_every_model_alike(
    tmp_path, monkeypatch
):
    model = tmp_path / "model"
    random_model().save_pretrained(model)
    tokenizer_with(CHATML).save_pretrained(model)
    conversations(tmp_path, 60)
    recipe = parse_recipe(
        {
            "model": str(model),
            "target_length": 256,
            "attention_temperature": 1.0,
            "data": {"sources": [str(tmp_path / "chat.jsonl")]},
            "rope": {"type": "yarn"},
        }
    )
    run = open_run(tmp_path / "run", recipe, "test")
    prepared = choose_separator(prepare_model(recipe), run)
    said = run.metadata()["separator"]["detail"]
    assert "not measured: the chat template writes what begins and ends a conversation" in said
    data = load_training_data(prepared, run)
    run.update(data=data_metadata(prepared, data, 1))
    asked = []
    monkeypatch.setattr(
        stages, "evaluate_model", lambda *args, **_: asked.append((args[0].label, args[3]))
    )
    stages.evaluate_run(prepared, run, "before")
    stages.evaluate_untrained(prepared, run, data)
    assert [label for label, _ in asked] == ["before", "untrained"]
    assert asked[0][1] == asked[1][1] and asked[0][1].chat_template is True
