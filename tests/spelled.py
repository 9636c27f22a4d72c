"""Small tokenizers: one whose tokens are given texts, one of bytes as Pythia's, and one that has
bytes for rare characters alone, as Llama's.
"""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


class Spelled:
    """Token i is the text i."""

    def __init__(self, *texts: str):
        self.texts = texts

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[i] for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.texts[token]


def of_bytes() -> PreTrainedTokenizerFast:
    """Bytes, merged only where a text was often seen."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["where is Anna? at the river.\n" * 9, "你好" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece makes it: a blank counts to the word behind it, written ▁."""
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "w", "a", "s", "安"]
    vocabulary = {piece: number for number, piece in enumerate([*known, "▁w", "▁wa", "▁was"])}
    merges = [("▁", "w"), ("▁w", "a"), ("▁wa", "s")]
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
