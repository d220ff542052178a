"""A whole small model directory (weights, tokenizer) and text to go with it, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .families import build

_SENTENCE = "the a river stone runs under old bridges while clouds gather over seven hills and rain falls on roofs"
_WORDS = _SENTENCE.split(" ")


def article(number: int, sentences: int = 12) -> str:
    """A text of its own for every number, from a fixed list of words."""
    told = [f"Article {number}"]
    for sentence in range(sentences):
        start, stride = number + 3 * sentence, 1 + (number + sentence) % 5
        told.append(" ".join(_WORDS[(start + stride * word) % len(_WORDS)] for word in range(9)) + ".")
    return "\n".join(told)


def articles(count: int = 60) -> list[str]:
    return [article(number) for number in range(count)]


def text_file(directory: Path, count: int = 60) -> Path:
    """`count` articles in one .jsonl file."""
    path = directory / "articles.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in articles(count)), encoding="utf-8")
    return path


def tokenizer(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few articles: any text becomes tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
    )
    bpe.train_from_iterator(articles(5), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def model_dir(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """A saved model of the family with random weights, and its tokenizer."""
    words = tokenizer()
    path = directory / family
    build(family, vocab_size=len(words), **changes).save_pretrained(path)
    words.save_pretrained(path)
    return path
