"""How large the Pythias are, from four numbers each: arithmetic without torch.

Pythia (arXiv 2304.01373, table 1) is the suite this kit fine-tunes: nine sizes of one architecture,
GPT-NeoX. `memory.ledger` counts any model exactly, tensor by tensor; this module answers in a
millisecond, before torch is loaded. Tests compare the two.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX: fused query-key-value, a feed-forward part four times as wide, biases, an untied
    embedding and head.
    """

    n_layers: int
    hidden: int
    heads: int
    vocab: int = 50304

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the four linear layers of a block, the ones that become 4-bit."""
        h = self.hidden
        return (h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)

    @property
    def n_linear(self) -> int:
        """Weights that become 4-bit (biases and the head are not)."""
        return self.n_layers * sum(n_in * n_out for n_in, n_out in self.linears)

    @property
    def n_parameters(self) -> int:
        """All parameters: with the biases of a block (9 · hidden), its two norms (4 · hidden), the
        last norm, both ends.
        """
        return self.n_linear + self.hidden * (13 * self.n_layers + 2 + 2 * self.vocab)


PYTHIA = {
    "14m": Shape(n_layers=6, hidden=128, heads=4),
    "70m": Shape(n_layers=6, hidden=512, heads=8),
    "160m": Shape(n_layers=12, hidden=768, heads=12),
    "410m": Shape(n_layers=24, hidden=1024, heads=16),
    "1b": Shape(n_layers=16, hidden=2048, heads=8),
    "1.4b": Shape(n_layers=24, hidden=2048, heads=16),
    "2.8b": Shape(n_layers=32, hidden=2560, heads=32),
    "6.9b": Shape(n_layers=32, hidden=4096, heads=32, vocab=50432),
    "12b": Shape(n_layers=36, hidden=5120, heads=40, vocab=50688),
}
"""The suite, smallest first."""


def pythia_size(model_id: str) -> str | None:
    """The size in a hub name such as EleutherAI/pythia-1b-deduped; None if it is no Pythia."""
    prefix = "EleutherAI/pythia-"
    size = model_id.removeprefix(prefix).removesuffix("-deduped")
    if model_id.startswith(prefix) and size in PYTHIA:
        return size
    return None
