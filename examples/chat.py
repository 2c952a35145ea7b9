"""Extend a chat model on conversations, and ask it something far behind its old window.

First a tiny chat model is made: the bundled base model learns two new tokens, a chat template and a
few dialogues. With a chat model of your own, type `skipwise extend MODEL --to 32k --data
chat.jsonl`: the template writes the conversations, and only the assistant's turns are trained.

python examples/chat.py --to 1024 --out runs/chat-example
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.config.parse import parse_recipe
from skipwise.data.chat import encode_conversation
from skipwise.data.chat_records import find_conversation
from skipwise.evaluation.tasks.prompts import random_words
from skipwise.pipeline.extend import extend
from skipwise.pipeline.quickstart import MODEL

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def dialogue(rng: np.random.Generator, num_turns: int) -> list[dict[str, str]]:
    """Turns of a user who asks for a word twice, and of an assistant who says it."""
    messages = []
    for word in random_words(rng, num_turns, 2):
        messages.append({"role": "user", "content": f"Say {word} twice."})
        messages.append({"role": "assistant", "content": f"Sure: {word} {word}."})
    return messages


def make_chat_model(folder: Path, steps: int, batch_size: int, rng: np.random.Generator) -> None:
    """The bundled base model with a chat template, trained at its own length."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in range(steps):
        turns = [find_conversation({"messages": dialogue(rng, 5)}) for _ in range(batch_size)]
        rows = [encode_conversation(tokenizer, one)[:128] for one in turns]
        width = min(map(len, rows))
        ids = torch.tensor([row[:width].tolist() for row in rows])
        masked = torch.tensor([row.masked[:width].tolist() for row in rows])
        loss = model(input_ids=ids, labels=ids.masked_fill(masked, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"chat model: loss {loss.item():.2f} after {steps} steps")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: Path, messages: list[dict[str, str]]) -> str:
    """What the model says next, with the token that ends its turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=int, default=1024, help="target length in tokens")
    parser.add_argument("--base-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chats", type=int, default=80, help="number of dialogues to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/chat-example"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / "tiny-chat"
    make_chat_model(model, args.base_steps, args.batch_size, rng)

    chats = args.out / "chat.jsonl"
    counts = rng.integers(4, 40, args.chats)
    lines = [json.dumps({"messages": dialogue(rng, int(n))}) for n in counts]
    chats.write_text("\n".join(lines), encoding="utf-8")
    recipe = parse_recipe(
        {
            "model": str(model),
            "target_length": args.to,
            "attention_temperature": 1.0,
            "rope": {"type": "yarn"},
            "data": {"sources": [str(chats)]},
            "training": {
                "num_steps": args.steps,
                "global_batch_size": args.batch_size,
                "micro_batch_size": args.batch_size,
                "learning_rate": 5e-4,
            },
            "eval": {"tasks": ["perplexity"], "perplexity_windows": 4, "untrained": False},
        }
    )
    run = extend(recipe, args.out / "run")

    messages = dialogue(rng, 200)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    while len(tokenizer.apply_chat_template(messages, return_dict=False)) > args.to - 64:
        messages = messages[2:]
    print(f"asked:    {messages[-2]['content']}")
    print(f"answered: {answer(run.model, messages[:-1])}")
    print(f"expected: {messages[-1]['content']}<|im_end|>")


if __name__ == "__main__":
    main()
