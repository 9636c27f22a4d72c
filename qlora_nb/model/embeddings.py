"""The two ends of a model: the input embedding and the head, which QLoRA leaves in 16 bit.

In pythia-12b each of them is 50,688 × 5,120 numbers, half a GiB. Two options save that memory on
the GPU:

- The embedding is only looked up, a row a token, so it can stay in the host's memory: what crosses
  the bus is one vector a token (`keep_embedding_on_cpu`).
- The head is a product like any other and can be stored in NF4 (`quantize_head`). Dequantized whole
  it would need a buffer as large as what was saved, so it is cut into slices of the vocabulary,
  each dequantized, applied and forgotten.
"""

import bitsandbytes as bnb
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from tqdm import tqdm

SLICE = 8192
"""Rows of the vocabulary dequantized at a time: 80 MiB of pythia-12b in 16 bit."""


class SlicedHead(nn.Module):
    """A head made of slices of the vocabulary, applied one after another: (…, width) → (…,
    vocabulary). The bias of the head (vocabulary,), where it has one, is kept as it is (Phi's,
    GPT-J's).
    """

    def __init__(self, slices: list[nn.Module], bias: nn.Parameter | None = None):
        super().__init__()
        self.slices = nn.ModuleList(slices)
        self.bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([part(hidden) for part in self.slices], dim=-1)
        if self.bias is not None:
            logits += self.bias.to(logits.dtype)
        return logits


def slice_rows(vocabulary: int) -> list[int]:
    """Rows of each slice: `SLICE` and what is left.

    >>> slice_rows(20_000)
    [8192, 8192, 3616]
    """
    return [min(SLICE, vocabulary - start) for start in range(0, vocabulary, SLICE)]


def are_tied(model: nn.Module) -> bool:
    """True if embedding and head are one tensor: then neither can be changed without the other."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def quantize_head(
    model: nn.Module, quant_type: str, double_quant: bool, compute_dtype: torch.dtype
) -> None:
    """Replace a model's head by a `SlicedHead` of 4-bit layers, in place."""
    head = model.get_output_embeddings()
    storage = {"quant_type": quant_type, "compress_statistics": double_quant}
    slices = []
    for rows in tqdm(head.weight.data.split(SLICE), desc="quantizing the head", unit="slice"):
        layer = bnb.nn.Linear4bit(
            head.in_features,
            len(rows),
            bias=False,
            compute_dtype=compute_dtype,
            device="meta",
            **storage,
        )
        weight = bnb.nn.Params4bit(rows.cpu(), requires_grad=False, **storage)
        layer.weight = weight.to(rows.device)  # bitsandbytes quantizes on the way
        layer.support_avx512bf16_for_cpu = False  # as in the blocks, see `load`
        slices.append(layer)
    model.set_output_embeddings(SlicedHead(slices, head.bias).eval())


def keep_embedding_on_cpu(model: nn.Module) -> None:
    """Move the input embedding to the host's memory: token ids are looked up there, the vectors
    are sent to where the ids came from. Tied embeddings are left alone by the caller.

    The weight becomes a plain attribute of its module, out of `parameters()`. As a parameter it
    would be the model's first, and transformers takes the device of the first parameter for that
    of the whole model (`PreTrainedModel.device`): `generate` would send everything to the CPU.
    """
    table = model.get_input_embeddings()
    table.to("cpu")
    weight = table.weight.detach()
    del table.weight
    table.weight = weight
    add_hook_to_module(table, AlignDevicesHook("cpu", io_same_device=True))
