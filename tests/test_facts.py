"""The published table of exact shapes: every Pythia and gpt-neox-20b, parameters and bytes to the last digit printed."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig

from qlora_nb.engine import ledger, shapes

GIB = 2**30
FROZEN = (*ledger.QUANTIZED, ledger.LINEARS, ledger.EMBEDDINGS, ledger.SMALL)
"""The lines that the published table adds up."""
TABLE = {  # layers, hidden, heads, vocabulary, total, share in 4-bit linears (%), GiB: fp16, NF4+DQ, NF4+DQ with the rest in fp32
    "14m": (6, 128, 4, 50304, 14_067_712, 8.4, None),
    "70m": (6, 512, 8, 50304, 70_426_624, 26.8, (0.131, 0.105, 0.201)),
    "160m": (12, 768, 12, 50304, 162_322_944, 52.3, (0.302, 0.185, 0.329)),
    "410m": (24, 1024, 16, 50304, 405_334_016, 74.5, (0.755, 0.338, 0.530)),
    "1b": (16, 2048, 8, 50304, 1_011_781_632, 79.6, (1.885, 0.771, 1.156)),
    "1.4b": (24, 2048, 16, 50304, 1_414_647_808, 85.4, (2.635, 0.965, 1.350)),
    "2.8b": (32, 2560, 32, 50304, 2_775_208_960, 90.7, (5.169, 1.691, 2.173)),
    "6.9b": (32, 4096, 32, 50432, 6_857_302_016, 94.0, (12.773, 3.868, 4.641)),
    "12b": (36, 5120, 40, 50688, 11_846_072_320, 95.6, (22.065, 6.412, 7.383)),
    "neox-20b": (44, 6144, 64, 50432, 20_554_567_680, 97.0, (38.286, 10.737, 11.898)),
}


def config(layers: int, hidden: int, heads: int, vocab: int) -> GPTNeoXConfig:
    """From the table's own columns, not from the kit's."""
    return GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
    )


@pytest.mark.parametrize("size", TABLE)
def test_parameters_and_bytes(size):
    *shape, total, share, gib = TABLE[size]
    made = config(*shape)
    model = ledger.meta_model(made)
    assert sum(p.numel() for p in model.parameters()) == total
    plain = ledger.predict(config=made, four_bit=False)
    assert plain.sum(FROZEN) == 2 * total
    assert round(100 * plain["linear weights"] / plain.sum(FROZEN), 1) == share
    if gib:
        small, upcast = ledger.predict(config=made), ledger.predict(config=made, rest_dtype=torch.float32)
        assert tuple(round(found.sum(FROZEN) / GIB, 3) for found in (plain, small, upcast)) == gib


@pytest.mark.parametrize("size", [s for s in TABLE if s in shapes.PYTHIA])
def test_the_kits_shapes_are_those_of_the_table(size):
    layers, hidden, heads, vocab, total, share, _ = TABLE[size]
    found, made = shapes.PYTHIA[size], ledger.pythia_config(size)
    assert (found.n_layers, found.hidden, found.vocab, found.n_parameters) == (layers, hidden, vocab, total)
    assert made.num_attention_heads == heads
    assert round(100 * found.n_linear / found.n_parameters, 1) == share
    assert sum(ledger.lora_numels(ledger.meta_model(made), 16)) == found.lora_parameters(16)


def test_every_pythia_of_the_kit_is_in_the_table():
    assert set(shapes.PYTHIA) == set(TABLE) - {"neox-20b"}
