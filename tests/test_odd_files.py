"""Odd files and records that people have: read as they are meant, or named with what to do."""

import bz2
import codecs
import gzip
import json
import lzma

import pyarrow
import pytest
from chats import CHATML, tokenizer_with

from skipwise.data.chat import encode_conversation
from skipwise.data.chat_records import Conversation, ConversationError, find_conversation
from skipwise.data.readers import BadRecords, parse_sources
from skipwise.data.shards import read_documents

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = json.dumps({"name": "weather", "arguments": {"city": "Bonn"}})
TOOL_TEMPLATE = """{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}
{{- '<call>' + (c.function | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def zstd(text):
    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


def read(folder, name, content):
    """(texts or conversations, bad records) of one file."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = BadRecords()
    (source,) = parse_sources([str(folder / name)])
    return list(read_documents(source, bad)), bad.first


ONE, TWO = lines({"text": "a"}), lines({"text": "b"})
READ = {  # name of the file, its content, its texts
    "semicolons, a comma in the header": ("a.csv", '"id, nr";text\n1;a, b\n2;c\n', ["a, b", "c"]),
    "a line for Excel": ("a.csv", "sep=;\nid;text\n1;a\n", ["a"]),
    "spaces in the header": ("a.csv", "id, text\n1,a\n", ["a"]),
    "quotes and newlines": ("a.csv", 'id,text\n1,"say ""a"",\nb"\n', ['say "a",\nb']),
    "UTF-16 CSV": ("a.csv", codecs.BOM_UTF16_BE + "id,text\n1,ö\n".encode("utf-16-be"), ["ö"]),
    "UTF-32 lines": ("a.jsonl", codecs.BOM_UTF32_LE + ONE.encode("utf-32-le"), ["a"]),
    "commas in TSV": ("a.tsv", "id\ttext\n1\ta, b, c\n", ["a, b, c"]),
    "a null paragraph": ("a.jsonl", lines({"text": ["a", None, "b"]}), ["a\n\nb"]),
    "bz2, two streams": (
        "a.jsonl.bz2",
        bz2.compress(ONE.encode()) + bz2.compress(TWO.encode()),
        ["a", "b"],
    ),
    "xz, two streams": ("a.jsonl.xz", lzma.compress(ONE.encode()) * 2, ["a", "a"]),
    "zstd, two frames": ("a.jsonl.zst", zstd(ONE) + zstd(TWO), ["a", "b"]),
    "zstd of pzstd": (
        "a.jsonl.zst",
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00" + bytes(4) + zstd(ONE),
        ["a"],
    ),
    "a page by its name": ("a.html", "<!DOCTYPE html><p>a", ["<!DOCTYPE html><p>a"]),
    "a text with a tag": ("a.txt", "<b>a", ["<b>a"]),
}
NAMED = {  # name of the file, its content, what is said
    "gzip twice": ("a.gz", gzip.compress(gzip.compress(b"a")), "gzip inside gzip: decompress it"),
    "a page named text": ("a.txt", "\n<!doctype HTML>\n<p>a", "an HTML page"),
    "a header that is not CSV": ("a.csv", '"id"x,text\n1,a\n', "its header is not CSV"),
    "null": ("a.jsonl", lines({"text": None}), "'text' holds null, not text"),
    "null in a list alone": ("a.jsonl", lines({"text": [None]}), "a list with null, not text"),
    "numbers in a list": ("a.jsonl", lines({"text": ["a", 3]}), "a list with a number, not text"),
    "a header without text": ("a.csv", "id,body\n1,long\n", "type data.text_field=body"),
}


@pytest.mark.parametrize("name", READ)
def test_an_odd_file_is_read(name, tmp_path):
    file, content, texts = READ[name]
    assert read(tmp_path, file, content) == (texts, [])


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_is_not_read_is_named(name, tmp_path):
    file, content, words = NAMED[name]
    texts, (said,) = read(tmp_path, file, content)
    assert not texts and words in said and "text_field=text" not in said


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{**USER, "content": [1]}, ASSISTANT]}, "a part of type unknown"),
        ({"messages": [{**USER, "content": [None]}, ASSISTANT]}, "a part of type unknown"),
        ({"messages": [USER, ASSISTANT], "tools": "[not json"}, "tools is not a list, or not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools is not a list"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": "x"}, "kwargs is not an object"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "tool_call", "value": "x"},
                ]
            },
            "turn 2 is a call that is not JSON with a name",
        ),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(record, words, tmp_path):
    assert words in find_conversation(record)
    assert words in read(tmp_path, "a.jsonl", lines(record))[1][0]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": json.dumps([USER, ASSISTANT])},
        {"conversations": json.dumps([{"from": "human", "value": "q"}, ASSISTANT])},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
    ],
)
def test_other_spellings_of_a_conversation_are_the_same_turns(record):
    assert find_conversation(record).messages == [USER, ASSISTANT]


def called(tools=TOOLS):
    turns = [("human", "q"), ("function_call", CALL), ("observation", "sun"), ("gpt", "a")]
    record = {"conversations": [{"from": name, "value": value} for name, value in turns]}
    return find_conversation({**record, "tools": json.dumps(tools)})


def test_a_call_of_sharegpt_is_a_turn_of_the_assistant_and_is_trained():
    conversation = called()
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    tokenizer = tokenizer_with(TOOL_TEMPLATE)
    tokens = encode_conversation(tokenizer, conversation)
    trained = tokenizer.decode(tokens[~tokens.masked].tolist())
    call = '<call>{"arguments": {"city": "Bonn"}, "name": "weather"}<|im_end|>'
    assert trained == f"{call}a<|im_end|>"


def test_a_template_that_drops_tools_or_calls_is_refused():
    with pytest.raises(ConversationError, match="does not write its tools"):
        encode_conversation(tokenizer_with(CHATML), called())
    with pytest.raises(ConversationError, match="does not write its tool calls"):
        encode_conversation(tokenizer_with(CHATML), called(tools=[]))
    plain = Conversation(messages=[USER, ASSISTANT])
    assert len(encode_conversation(tokenizer_with(CHATML), plain))
