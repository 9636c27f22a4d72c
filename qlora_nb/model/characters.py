"""Tokens as texts, a whole character at a time.

A tokenizer of bytes, as Pythia's, cuts a rare character into several tokens: most Chinese ones into
two or three. One of them alone has no text, and `decode` gives "\\ufffd" for it. Here the last one
of them stands for the whole character, and one before it for its bytes: <0xE7>.
"""

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""What stands for a byte in the vocabulary of a tokenizer of bytes → the byte."""


def last(ids: list[int], tokenizer) -> tuple[str, int]:
    """The text that ends with the last of these tokens, and of how many tokens: as few as make
    whole characters, at most 4. If none do: the bytes of the last one.
    """
    piece = tokenizer.convert_ids_to_tokens(ids[-1])
    if piece is None:  # an embedding can have more rows than there are tokens
        return "", 1
    for n_tokens in range(1, 5):
        text = tokenizer.decode(ids[-n_tokens:])
        if "\ufffd" not in text:
            if piece.startswith("▁"):  # a blank, which is left out where a text begins
                text = f" {text.lstrip(' ')}"
            return text, n_tokens
    if not piece.startswith("<0x"):  # so it is called where only rare characters are cut
        piece = "".join(f"<0x{BYTES.get(character, 0):02X}>" for character in piece)
    return piece, 1


def joined(ids: list[int], tokenizer) -> str:
    """The text of tokens; what is left of a character that is cut off is shown as its bytes."""
    texts: list[str] = []
    for end in range(1, len(ids) + 1):
        text, n_tokens = last(ids[:end], tokenizer)
        texts = texts[: len(texts) + 1 - n_tokens]
        texts.append(text)
    return "".join(texts)
