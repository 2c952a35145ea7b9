"""Chat templates, the masks of their conversations made by hand, and random conversations."""

import json

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer

from skipwise.data.readers import parse_sources
from skipwise.pipeline.quickstart import MODEL

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
