"""Whole characters where single tokens are shown: masks, next tokens, answers as they are written."""

from __future__ import annotations

import codecs
import re
from types import SimpleNamespace

import pytest
import spelled
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from qlora_nb.answer import adapters, generate
from qlora_nb.model import characters, data_report
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.settings import validate

TEXTS = [
    "was",
    "安娜在河边。",
    "was 安 was 娜娜 was",
    "👩\u200d🔬🇨🇳🙂",
    "e\u0301 n\u0303 가",
    "𠮷龘",
    "你好 was\n猫",
]
TOKENIZERS = {
    "bytes": spelled.of_bytes,
    "bytes for rare characters": spelled.with_fallback,
    "pocket": lambda: AutoTokenizer.from_pretrained(MODEL_DIR),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_token_has_a_text_and_the_last_of_a_character_all_of_it(tokenizer, text):
    """Against Python's own decoder of UTF-8, which says where characters end."""
    ids = ids_of(tokenizer, text)
    decoder = codecs.getincrementaldecoder("utf-8")()
    begun = b""
    for place, token in enumerate(ids):
        shown, n_tokens = characters.last(ids[: place + 1], tokenizer)
        assert "\ufffd" not in shown
        part = bytes_of(tokenizer, token)
        ended = decoder.decode(part)
        if ended:
            assert shown == ended
            assert n_tokens == 1 or begun
            begun = b""
        else:
            begun += part
            assert shown == "".join(f"<0x{byte:02X}>" for byte in part)
            assert n_tokens == 1
    assert not begun
    assert characters.joined(ids, tokenizer).removeprefix(" ") == text


def bytes_of(tokenizer, token) -> bytes:
    """A token's bytes, found by the tokenizer's own names of the 256 bytes."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch("<0x..>", piece):
        return bytes.fromhex(piece[3:5])
    if "▁" in tokenizer.get_vocab():
        return piece.replace("▁", " ").encode()
    alphabet = {}
    for byte in range(256):
        plain = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        n_before = sum(name >= 256 for name in alphabet)
        alphabet[byte if plain else 256 + n_before] = byte
    return bytes(alphabet[ord(character)] for character in piece)


def test_what_is_cut_off_at_either_end_is_shown_as_bytes(tokenizer):
    ids = ids_of(tokenizer, "猫猫")
    whole = "猫".encode()
    cut = characters.joined(ids[:-1], tokenizer)
    assert cut.removeprefix(" ") == "猫" + "".join(f"<0x{byte:02X}>" for byte in whole[:-1])
    rest = characters.joined(ids[-5:], tokenizer)
    assert rest == "".join(f"<0x{byte:02X}>" for byte in whole[1:]) + "猫"


@pytest.mark.parametrize("text", TEXTS)
def test_a_row_is_shown_whole_and_cut_where_training_begins(tokenizer, text):
    """And a row that max_length has cut inside a character ends in bytes."""
    asked, said = ids_of(tokenizer, "was 猫?\n"), ids_of(tokenizer, text)
    trains = [False] * len(asked) + [True] * len(said)
    found = data_report.pieces(asked + said, trains, tokenizer)
    assert [train for _, train in found] == [False, True]
    assert [shown.removeprefix(" ") for shown, _ in found] == ["was 猫?\n", text]


def test_a_row_of_the_embedding_that_belongs_to_no_token_has_no_text(tokenizer):
    """Embeddings are padded: Pythia's has 50,304 rows for 50,277 tokens, and any can be likely."""
    assert characters.last([*ids_of(tokenizer, "was"), len(tokenizer) + 3], tokenizer) == ("", 1)


def test_a_blank_is_not_lost_between_two_words():
    tokenizer = spelled.with_fallback()
    ids = ids_of(tokenizer, "was was")
    assert tokenizer.decode(ids[-1:]) == "was", "alone it has lost its blank"
    assert characters.last(ids, tokenizer) == (" was", 1)


def test_more_than_one_character_in_a_row_of_tokens_that_cross_them():
    """A merge of bytes can end one character and begin the next."""
    parts = ["猫狗".encode()[:2], "猫狗".encode()[2:4], "猫狗".encode()[4:]]
    names = {byte: name for name, byte in characters.BYTES.items()}
    tokenizer = SimpleNamespace(
        decode=lambda ids: b"".join(parts[i] for i in ids).decode("utf-8", "replace"),
        convert_ids_to_tokens=lambda i: "".join(names[byte] for byte in parts[i]),
    )
    assert characters.joined([0, 1, 2], tokenizer) == "猫狗"
    assert characters.joined([0, 1], tokenizer) == "<0xE7><0x8C><0xAB><0xE7>"


# ---- a model that writes Chinese -------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer():
    """A small model that has learnt one answer by heart, and its tokenizer, of bytes."""
    tokenizer = spelled.of_bytes()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<pad>"})
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), intermediate_size=64, **shape)
    model = AutoModelForCausalLM.from_config(config)
    settings = validate({"max_new_tokens": 24, "prompt_template": "alpaca_short"})
    row = {"instruction": "猫?", "input": "", "output": ""}
    prompt = generate.data.prompt_ids(row, tokenizer, settings.prompt_template)
    answer = [*ids_of(tokenizer, "猫在河边🙂"), tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, settings, row


@pytest.fixture
def without_adapter(monkeypatch):
    """Base and tuned are one model here."""
    monkeypatch.setattr(adapters, "base_or_tuned", lambda model, tuned: torch.no_grad())


def test_next_tokens_inside_a_character(writer, without_adapter):
    model, tokenizer, settings, row = writer
    steps = generate.next_tokens_along(model, tokenizer, row, settings, "猫在河边🙂")
    shown = [text for text, *_ in steps]
    cat = [f"<0x{byte:02X}>" for byte in "猫".encode()]
    assert shown[:3] == [cat[0], cat[1], "猫"]
    assert [text for text in shown if not text.startswith("<0x")] == [*"猫在河边🙂", "(end)"]
    for text, base, tuned, bits in steps[:-1]:
        assert base[0][0] == tuned[0][0] == text, "the most probable one is what it has learnt"
        assert len(base) == 3
        assert bits == pytest.approx(0, abs=1e-5)
    assert steps[-1][1][0][0] == "<end>"
    [(_, base, _, _)] = generate.next_tokens_along(model, tokenizer, row, settings, "", k=5)
    assert base[0][0] == cat[0]
    assert not [text for text, _ in base if "\ufffd" in text]


def test_an_answer_grows_by_whole_characters_and_ends_in_one(writer, without_adapter):
    model, tokenizer, settings, row = writer
    grown = [said.text for said in generate.stream(model, tokenizer, row, settings, tuned=True)]
    assert grown[-1] == "猫在河边🙂"
    assert not [text for text in grown if "\ufffd" in text]
    full = len(ids_of(tokenizer, "猫在河边🙂"))
    for n_tokens in range(1, full):
        fewer = settings.replace(max_new_tokens=n_tokens)
        last = generate.answer(model, tokenizer, row, fewer, tuned=True)
        [in_a_batch] = generate.answer_all(model, tokenizer, [row], fewer)
        assert last.n_tokens == n_tokens
        assert last.text == in_a_batch
        assert "\ufffd" not in last.text
        assert "猫在河边🙂".startswith(last.text)
    assert last.text == "猫在河边"
