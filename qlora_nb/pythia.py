"""How large the Pythias are, from four numbers each: arithmetic without torch.

Pythia (arXiv 2304.01373, table 1) is the suite this kit fine-tunes: nine sizes of one architecture,
GPT-NeoX. `memory.ledger` counts any model exactly, tensor by tensor; this module answers in a
millisecond, before torch is loaded. Tests compare the two.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path


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


_SIZES = tomllib.loads(Path(__file__).with_name("pythia.toml").read_text(encoding="utf-8"))

PYTHIA = {size: Shape(**numbers) for size, numbers in _SIZES.items()}
"""The suite, smallest first."""


def pythia_size(model_id: str) -> str | None:
    """The size in a hub name such as EleutherAI/pythia-1b-deduped; None if it is no Pythia."""
    prefix = "EleutherAI/pythia-"
    size = model_id.removeprefix(prefix).removesuffix("-deduped")
    if model_id.startswith(prefix) and size in PYTHIA:
        return size
    return None
