"""Conversations in examples, in evaluation and in runs: where chunks may begin, what is asked."""

import dataclasses

import numpy as np
import pytest
import torch
from chats import (
    CASES,
    CHATML,
    HEADERS,
    TURNS,
    conversations,
    tokenizer_with,
)
from transformers import LlamaConfig, LlamaForCausalLM

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import EvalSettings
from skipwise.config.run_folder import open_run
from skipwise.data.chat import ChatTokens, encode_conversation
from skipwise.data.chat_records import Conversation
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.tokenize import tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.evaluation.run import eval_settings, evaluation_documents
from skipwise.evaluation.tasks import passkey
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.evaluation.tasks.prompts import ChatPrompts, token_ids
from skipwise.evaluation.tasks.ruler import make_samples
from skipwise.models.prepared import prepare_model
from skipwise.pipeline import stages
from skipwise.pipeline.choose_separator import choose_separator
from skipwise.pose.samplers import IGNORE_INDEX, FullLength, PoSE, RandPos
from skipwise.training.inputs import check_data, data_metadata, load_training_data


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
