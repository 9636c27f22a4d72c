"""How large a model is, from its configuration alone: arithmetic without torch, checked against the real modules in tests.

Counts every causal decoder with the usual parts: attention, a feed-forward block, two norms a layer, an embedding and a
head. `ledger` counts exactly, tensor by tensor; this module answers in a millisecond whether a model can fit at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qlora_nb.errors import KitError
from qlora_nb.pocket import MODEL_DIR


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `linears` are (in, out) of the linear layers of one block, the ones that become 4-bit."""

    name: str
    n_layers: int
    hidden: int
    vocab: int
    linears: tuple[tuple[int, int], ...]
    biases: bool
    tied: bool
    norm_has_bias: bool

    @property
    def n_linear(self) -> int:
        """Weights that become 4-bit (biases and the head are not)."""
        return self.n_layers * sum(i * o for i, o in self.linears)

    @property
    def n_parameters(self) -> int:
        """All parameters."""
        bias = sum(o for _, o in self.linears) if self.biases else 0
        norm = self.hidden * (2 if self.norm_has_bias else 1)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.n_linear + self.n_layers * (bias + 2 * norm) + norm + embeddings

    def lora_parameters(self, r: int) -> int:
        """Trained numbers with LoRA of rank `r` on every linear layer: r · (in + out) each."""
        return self.n_layers * sum(r * (i + o) for i, o in self.linears)

    def weight_bytes(self, double_quant: bool) -> int:
        """4-bit weights with their scales and the rest in 16 bit: what inference loads."""
        scales = self.n_linear / 64 * (1 + 4 / 256 if double_quant else 4)
        return int(self.n_linear / 2 + scales + 2 * (self.n_parameters - self.n_linear))

    def static_bytes(self, double_quant: bool, r: int) -> int:
        """A lower bound for fine-tuning: 4-bit weights and scales, 16-bit rest, float32 adapter with gradient and 8-bit Adam."""
        return self.weight_bytes(double_quant) + self.lora_parameters(r) * (4 + 4 + 2)


def gpt_neox(name: str, n_layers: int, hidden: int, vocab: int) -> Shape:
    """Shape of a Pythia-like model: fused query-key-value, feed-forward four times as wide, biases, untied embeddings."""
    linears = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
    return Shape(name, n_layers, hidden, vocab, linears, biases=True, tied=False, norm_has_bias=True)


PYTHIA: dict[str, Shape] = {
    size: gpt_neox(f"pythia-{size}", layers, hidden, vocab)
    for size, layers, hidden, vocab in (
        ("14m", 6, 128, 50304),
        ("70m", 6, 512, 50304),
        ("160m", 12, 768, 50304),
        ("410m", 24, 1024, 50304),
        ("1b", 16, 2048, 50304),
        ("1.4b", 24, 2048, 50304),
        ("2.8b", 32, 2560, 50304),
        ("6.9b", 32, 4096, 50432),
        ("12b", 36, 5120, 50688),
    )
}
"""The Pythia suite (arXiv 2304.01373, table 1), smallest first."""
NEOX_20B = gpt_neox("gpt-neox-20b", 44, 6144, 50432)


def from_config(name: str, config: dict) -> Shape:
    """Shape from the contents of a `config.json`."""
    get = config.get
    hidden, layers = get("hidden_size") or get("n_embd"), get("num_hidden_layers") or get("n_layer")
    heads = get("num_attention_heads") or get("n_head")
    if not (hidden and layers and heads and get("vocab_size")):
        raise KitError(f"{name}: config.json has no sizes of a causal language model", remedy="choose a causal language model")
    inner = get("intermediate_size") or get("n_inner") or 4 * hidden
    head_dim = get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (get("num_key_value_heads") or heads) * head_dim
    llama_like = get("hidden_act") == "silu"
    linears = [(hidden, q + 2 * kv), (q, hidden), (hidden, inner), (inner, hidden)] + ([(hidden, inner)] if llama_like else [])
    tied = get("tie_word_embeddings", llama_like)
    return Shape(name, layers, hidden, config["vocab_size"], tuple(linears), not llama_like, tied, not llama_like)


SMOLLM2 = from_config(
    "SmolLM2-135M",
    {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
)


def shape_of(model_id: str) -> Shape | None:
    """Shape of a model by name or folder; None for a hub model whose configuration is not on this machine yet.

    Raises:
        KitError: a folder without a readable config.json.
    """
    size = model_id.removeprefix("EleutherAI/").removeprefix("pythia-").removesuffix("-deduped")
    if model_id.startswith("EleutherAI/pythia-") and size in PYTHIA:
        return PYTHIA[size]
    if model_id == "EleutherAI/gpt-neox-20b":
        return NEOX_20B
    if model_id == "smollm2":
        return SMOLLM2
    folder = MODEL_DIR if model_id == "pocket" else Path(model_id).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        try:
            return from_config(model_id, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            if isinstance(error, KitError):
                raise
            raise KitError(
                f"{path.name} of the model folder cannot be read ({type(error).__name__})",
                value=model_id,
                remedy="give a folder made by save_pretrained, with config.json, weights and tokenizer",
            ) from None
    return None
