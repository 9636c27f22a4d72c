"""Checkers of the exercises in notebooks 03 and 04; the right answers are computed, not written down."""

import torch

from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.ui.checks import exercise

NF4 = codebooks.nf4_code()

hint = "absmax is 1, so look for the nearest value in the table; indices count from 0 at -1"
check_indices = exercise("indices", blockwise.quantize(torch.tensor([0.5, -1.0, 0.1, 0.0]), NF4, blocksize=4)[0], hint)
"""03, exercise 1: the NF4 indices of the block [0.5, -1.0, 0.1, 0.0]."""

check_byte = exercise("byte", blockwise.pack(torch.tensor([12, 5]))[0], "the first index is the high nibble: it counts 16-fold")
"""03, exercise 2: the byte that holds the indices 12 and 5."""

hint = "four bits: halves of 1/32 and 1/30, that is 2·16 and 2·15; three bits have 8 codes, so 2·8 and 2·7"
check_tail_quantile = exercise("tail quantile", 1 - (1 / 16 + 1 / 14) / 2, hint, 1e-4)
"""03, exercise 3: the tail quantile of an 8-value (3-bit) NormalFloat code, to four decimals."""

hint = "half of the widest gap between neighbouring values, times absmax; the widest gap is at the negative end"
check_max_error = exercise("largest error", 2 * NF4.diff().max().item() / 2, hint, 2e-3)
"""03, exercise 4: the largest possible error of one weight in an NF4 block with absmax 2, to three decimals."""

hint = "4 bits, 8 bits shared by 128, 32 bits shared by 128 · 256"
check_bits_128 = exercise("bits per weight", double_quant.bits_per_weight(128, 256), hint, 1.5e-4)
"""04, exercise 1: bits a weight with blocks of 128 and double quantization with 256."""

hint = "count the blocks of 64 first: 4 bytes each before; then 1 byte each, 4 for every 256 of them, and 4 for the mean"
before, after = (sum(double_quant.storage_bytes(4096 * 4096, 64, second).values()) for second in (None, 256))
check_saved_bytes = exercise("bytes saved", before - after, hint, 1e-9)
"""04, exercise 2: bytes that double quantization saves on one 4096 × 4096 matrix, the mean counted."""

hint = "8/blocksize alone must stay below 0.5, and 32/(256 · blocksize) comes on top"
smallest = next(b for b in (1, 2, 4, 8, 16, 32, 64) if double_quant.bits_per_weight(b, 256) < 4.5)
check_same_bits = exercise("block size", smallest, hint)
"""04, exercise 3: the smallest power-of-two block size that with double quantization costs less than 4.5 bits."""
