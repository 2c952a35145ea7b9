"""Train the tiny model's tokenizer: SentencePiece BPE, byte fallback, single digits, 1,024 pieces.

python research/tiny_model/make_tokenizer.py OUT_FOLDER

Writes `tokenizer.model` (for llama.cpp) and the `tokenizer.json` it converts to, and checks that
the two give the same ids over the standard library, but for texts that spell a special token.
"""

import sys
from itertools import islice
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import make_parser

from skipwise.evaluation.tasks import passkey
from skipwise.pipeline.quickstart import corpus

VOCAB_SIZE = 1024


def train_sentencepiece(prefix: Path, modules: list[tuple[str, str]]) -> None:
    lines = [
        line
        for name, text in modules
        if not corpus.held_out(name)
        for line in text.splitlines()
        if line.strip() and len(line) < 4000
    ]
    prose = [passkey.prompt("81501", 10, 0.5)] * 200
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + [s for p in prose for s in p.splitlines()]),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        character_coverage=0.9995,
        num_threads=2,
        minloglevel=2,
    )


def convert(model_file: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer as a `tokenizers` object, the way Llama's was converted."""
    sp = spm.SentencePieceProcessor(model_file=str(model_file))
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (rank, piece[:cut], piece[cut:])
        for rank, piece in enumerate(pieces)
        if rank > 2 and not sp.is_byte(rank)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda m: (m[0], vocab[m[1]], vocab[m[2]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    modules = list(islice(corpus.modules(), 40 if args.smoke else None))
    train_sentencepiece(out / "tokenizer", modules)
    (out / "tokenizer.vocab").unlink()
    tokenizer = convert(out / "tokenizer.model")
    tokenizer.save_pretrained(out)
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    texts = [text for _, text in modules]
    plain = [t for t in texts if not any(s in t for s in tokenizer.all_special_tokens)]
    different = [t for t in plain if tokenizer(t)["input_ids"] != sp.encode(t)]
    assert not different, f"{len(different)} of {len(plain)} modules are tokenized differently"
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    characters = sum(map(len, texts)) / tokens
    print(f"{len(texts)} modules, {tokens:,} tokens, {characters:.2f} characters each")


if __name__ == "__main__":
    main()
