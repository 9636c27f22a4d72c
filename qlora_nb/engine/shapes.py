"""How large the Pythias are, from four sizes each: arithmetic without torch, checked against the real modules in tests.

`ledger` counts any model exactly, tensor by tensor; this module answers in a millisecond, before torch is loaded.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX: fused query-key-value, a feed-forward part four times as wide, biases, an untied embedding and head."""

    name: str
    n_layers: int
    hidden: int
    heads: int
    vocab: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the four linear layers of a block, the ones that become 4-bit."""
        h = self.hidden
        return (h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)

    @property
    def n_linear(self) -> int:
        """Weights that become 4-bit (biases and the head are not)."""
        return self.n_layers * sum(i * o for i, o in self.linears)

    @property
    def n_parameters(self) -> int:
        """All parameters: with the biases of a block (9 · hidden), its two norms (4 · hidden), the last norm, both ends."""
        return self.n_linear + self.hidden * (13 * self.n_layers + 2 + 2 * self.vocab)

    def lora_parameters(self, r: int) -> int:
        """Trained numbers with LoRA of rank `r` on every linear layer: r · (in + out) each."""
        return self.n_layers * sum(r * (i + o) for i, o in self.linears)

    def weight_bytes(self, double_quant: bool) -> int:
        """4-bit weights with their scales and the rest in 16 bit: what inference loads."""
        scales = self.n_linear / 64 * (1 + 4 / 256 if double_quant else 4)
        return int(self.n_linear / 2 + scales + 2 * (self.n_parameters - self.n_linear))


PYTHIA: dict[str, Shape] = {
    size: Shape(f"pythia-{size}", layers, hidden, heads, vocab)
    for size, layers, hidden, heads, vocab in (
        ("14m", 6, 128, 4, 50304),
        ("70m", 6, 512, 8, 50304),
        ("160m", 12, 768, 12, 50304),
        ("410m", 24, 1024, 16, 50304),
        ("1b", 16, 2048, 8, 50304),
        ("1.4b", 24, 2048, 16, 50304),
        ("2.8b", 32, 2560, 32, 50304),
        ("6.9b", 32, 4096, 32, 50432),
        ("12b", 36, 5120, 40, 50688),
    )
}
"""The Pythia suite (arXiv 2304.01373, table 1), smallest first."""


def pythia_size(model_id: str) -> str | None:
    """The size in a hub name such as EleutherAI/pythia-1b-deduped; None if it is no Pythia."""
    size = model_id.removeprefix("EleutherAI/pythia-").removesuffix("-deduped")
    return size if model_id.startswith("EleutherAI/pythia-") and size in PYTHIA else None


def download_bytes(model_id: str) -> int | None:
    """Bytes of a model's weights: of a Pythia two for each parameter, of a folder what lies there; None if only the hub knows."""
    if size := pythia_size(model_id):
        return 2 * PYTHIA[size].n_parameters
    folder = Path(model_id).expanduser()
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else None
