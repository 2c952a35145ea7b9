"""The quickstart's parts: the bundled model is what is said of it, and its text is kept apart."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.errors import SkipwiseError
from skipwise.evaluation.scoring import exact_match
from skipwise.evaluation.tasks.passkey import passkey_trials
from skipwise.pipeline.quickstart import MODEL, corpus, make_recipe


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_bundled_model_is_small_and_safetensors():
    files = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert "model.safetensors" in files and not any(n.endswith((".bin", ".pt")) for n in files)


def test_the_base_finds_the_passkey_in_its_window_and_not_beyond(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert model.config.max_position_embeddings == 256
    found = {}
    for length in (256, 512):
        trials = passkey_trials(tokenizer, length, num_trials=20, num_depths=5)
        found[length] = np.mean(exact_match(model, trials, 16384))
    assert found[256] >= 0.95 and found[512] <= 0.05


@pytest.mark.parametrize("text", ["x = 81501\n", "def f():\n\treturn 'né ∑'", "  two  spaces ", ""])
def test_the_tokenizer_gives_back_every_text_and_splits_digits(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    digits = [tokenizer.decode([i]) for i in tokenizer("81501")["input_ids"]]
    assert digits == list("81501")


def test_the_sentencepiece_file_gives_the_same_ids(tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    other = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    for _, text in list(corpus.modules())[:20]:
        assert tokenizer(text, verbose=False)["input_ids"] == other.encode(text)


def test_modules_are_held_out_by_name_alone():
    names = [name for name, _ in corpus.modules()]
    held = [name for name in names if corpus.held_out(name)]
    assert len(names) > 300 and 0.06 < len(held) / len(names) < 0.2
    # the same on every Python version: by checksum of the name
    assert corpus.held_out("_bootsubprocess") and corpus.held_out("_pydecimal")
    assert not corpus.held_out("argparse") and not corpus.held_out("zipfile")


def test_passkey_documents_have_exactly_the_training_length_and_their_answer(tokenizer):
    rng = np.random.default_rng(0)
    sources = [text for _, text in list(corpus.modules())[:30]]
    for _ in range(10):
        text = corpus.passkey_document(tokenizer, 256, rng, sources)
        assert len(tokenizer(text)["input_ids"]) == 256
        key = text.rsplit("The pass key is ", 1)[1][:5]
        assert key.isdigit() and text.count(key) >= 3


def test_a_length_without_room_for_a_passkey_is_an_error_that_names_the_smallest(tokenizer):
    rng, sources = np.random.default_rng(0), ["x = 1\n" * 50]
    with pytest.raises(SkipwiseError, match=r"train_length=96 has no room.*\ngive 128 or more"):
        corpus.passkey_document(tokenizer, 96, rng, sources)
    assert corpus.passkey_document(tokenizer, 128, rng, sources)


def test_the_recipe_keeps_evaluation_modules_out_of_training(monkeypatch):
    monkeypatch.setattr("skipwise.pipeline.quickstart._PASSKEY_TOKENS", 3 * 512)
    recipe = make_recipe(["training.num_steps=7"])
    assert recipe.training.num_steps == 7 and recipe.target_length == 2048

    def texts(path):
        with open(path) as file:
            return {json.loads(line)["text"] for line in file}

    train = texts(recipe.data.sources[0]["path"])
    evaluation = texts(recipe.data.eval_sources[0])
    assert len(train) > 300 and len(evaluation) > 30
    shared = {text for text in train & evaluation if text.strip()}
    assert not {t for t in shared if len(t) > 2000}
