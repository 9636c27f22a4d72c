"""One token after another, faster, from weights that stay in 4 bit.

For every new token one vector meets every weight. On a CPU bitsandbytes unpacks each matrix for it: the scales from their
scales, then the codes, into a new buffer in main memory that is as large as the matrix in float32. The product reads the buffer
once, and it is thrown away; half of the time of plain `generate` goes there for the pocket model, three quarters for SmolLM2
(recorded by `benchmarks/decoding.py`). Four things are done here instead:

- the scales are unpacked once an answer, not once a token (4 bytes for 64 weights in place of 1);
- codes are unpacked a slice of rows at a time into one small buffer, so that the product finds them in the processor's cache;
- one thread makes the products: what lies in one core's cache is gone through sooner than two threads have met;
- the adapter's two thin products are called without PEFT's copies and module calls in between.

The kernels are bitsandbytes' own, the sums are the same, the tokens too. On a GPU nothing is changed: there bitsandbytes
multiplies packed weights directly (`autograd/_functions.py`, `matmul_4bit`). Nor would a static cache help: transformers does
not compile the step of a model that bitsandbytes has quantized (`is_compileable` is False for it; `generation/utils.py`,
`_valid_auto_compile_criteria`), and without compiling, attention would go over the empty places of such a cache too.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib
from packaging.version import Version
from peft.tuners.lora.bnb import Linear4bit as Adapted
from torch.nn.functional import linear

from qlora_nb.engine import models
from qlora_nb.engine.objective import replaced_forward

SLICE_BYTES, SLICE_SHARE = 2**19, 0.06
"""The buffer: what fits a core's own cache beside other things, and no more than this share of the model."""
_KERNELS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_FREE = threading.Lock()


@contextmanager
def fast(model: torch.nn.Module) -> Iterator[None]:
    """Inside, this thread decodes one row faster: one of its calls of `generate`, without gradients, in eval mode. (Many rows
    share what is unpacked: they go the plain way, with every thread.)

    Other threads, and a second model meanwhile, go the plain way. What is needed on top of the model's bytes (scales and
    buffer) is given back at the end. On a GPU nothing is changed.
    """
    if models.on_gpu() or not _FREE.acquire(blocking=False):
        yield
        return
    changed, threads = [], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        size = int(min(SLICE_BYTES, SLICE_SHARE * model.get_memory_footprint()))
        buffer = torch.empty(max(size, *(4 * getattr(m, "in_features", 0) for m in model.modules())), dtype=torch.uint8)
        for module in model.modules():
            forward = None
            if isinstance(module, bnb.nn.Linear4bit):
                forward = _in_slices(module, buffer)
            elif isinstance(module, Adapted) and not (module.merged or module.lora_variant or module.training):
                forward = _adapted(module)
                if not _gives_the_same(forward, module):
                    forward = None
            if forward and "forward" not in vars(module):
                module.forward = _for_this_thread(forward, module.forward)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
        torch.set_num_threads(threads)
        _FREE.release()


def _for_this_thread(quick: Callable, plain: Callable) -> Callable:
    owner = threading.get_ident()  # the buffer serves one product at a time

    def forward(x, *args, **more):
        if threading.get_ident() == owner and not args and not more:
            return quick(x)
        return plain(x, *args, **more)

    return forward


def _in_slices(layer: bnb.nn.Linear4bit, buffer: torch.Tensor) -> Callable | None:
    """x Wᵀ + b, a slice of W's rows unpacked into `buffer` at a time; None where bitsandbytes has no such kernel."""
    state, dtype = layer.weight.quant_state, layer.compute_dtype
    rows, width = state.shape
    unpack = getattr(lib, f"cdequantize_blockwise_cpu_{state.quant_type}_{_KERNELS.get(dtype)}", None)
    if unpack is None or width % state.blocksize or Version(bnb.__version__) < Version("0.50"):  # earlier ones were not tried
        return None
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    absmax, bias = absmax.float(), None if layer.bias is None else layer.bias.to(dtype)
    step, parts = max(1, buffer.nbytes // (width * dtype.itemsize)), []
    for start in range(0, rows, step):
        n = min(step, rows - start)
        codes, scales = layer.weight.data_ptr() + start * width // 2, absmax.data_ptr() + 4 * (start * width // state.blocksize)
        given = [*map(ctypes.c_void_p, (codes, scales, buffer.data_ptr())), *map(ctypes.c_longlong, (state.blocksize, n, width))]
        own = None if bias is None else bias[start : start + n]
        parts.append((given, buffer[: n * width * dtype.itemsize].view(dtype).view(n, width), own))

    def slice_of(x, given, weight, own):
        unpack(*given)
        return linear(x, weight, own)

    def forward(x, keep=absmax):  # the kernel knows the scales by their address only
        inner = x.to(dtype)
        done = [slice_of(inner, *part) for part in parts]
        return (torch.cat(done, dim=-1) if len(done) > 1 else done[0]).to(x.dtype)

    return forward


def _gives_the_same(quick: Callable, layer: Adapted) -> bool:
    """Whether `quick` is what this layer's adapter really computes (PEFT knows kinds that it does not), on one random vector.

    The base's product, which both call, is left out: what is compared costs as much as one token's adapter.
    """
    base = layer.base_layer
    x = torch.randn(1, 1, base.in_features, generator=torch.Generator().manual_seed(0)).to(base.compute_dtype)

    def nothing(x, *args, **more):
        return x.new_zeros(*x.shape[:-1], base.out_features)

    with torch.no_grad(), replaced_forward(base, nothing):
        found = quick(x)
        wanted = layer(x)
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


def _adapted(layer: Adapted) -> Callable:
    """W x + (B A x) · scale, as in `peft/tuners/lora/bnb.py`, `Linear4bit.forward`; W x alone while adapters are disabled."""

    def forward(x):
        result = layer.base_layer(x)
        for name in () if layer.disable_adapters else layer.active_adapters:
            first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
            result = result + (linear(linear(x.to(first.dtype), first), second) * layer.scaling[name]).to(result.dtype)
        return result

    return forward
