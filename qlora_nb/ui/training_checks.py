"""Checkers for the exercises of notebooks 01, 06 and 07."""

from itertools import accumulate

from qlora_nb.ui.checks import verdict


def check_rows_in_a_step(stub, settings) -> bool:
    """Rows in one optimizer step: batch size times accumulation."""
    want = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return verdict(stub, want, "rows in a step", "rows in a forward pass, times forward passes in a step")


def check_bytes_per_trained_number(stub) -> bool:
    """Weight, gradient and two Adam states in float32: 16 bytes."""
    hint = "Adam keeps two states for each number" if stub == 12 else "weight, gradient and two states, four bytes each"
    return verdict(stub, 16, "bytes per trained number", hint)


def check_labels(stub, ids: list[int], n_prompt: int) -> bool:
    """Prompt masked with -100, answer and end token labelled."""
    want = [-100] * n_prompt + ids[n_prompt:]
    hint = "the prompt must not train"
    if isinstance(stub, list) and len(stub) == len(ids) and stub[-1] == -100:
        hint = "the end token must train, or the model never stops"
    return verdict(stub, want, "labels", hint)


def check_weight_gib(stub, n_parameters: int, n_bits: int) -> bool:
    """Memory of `n_parameters` weights of `n_bits` each, in GiB."""
    hint = "eight bits are a byte, 2^30 bytes a GiB"
    if isinstance(stub, (int, float)) and abs(stub - n_parameters * n_bits / 1e9 / 8) < 0.01:
        hint = "that is GB of 10^9 bytes; a GiB has 2^30"
    if isinstance(stub, (int, float)) and abs(stub - n_parameters * n_bits / 2**30) < 0.1:
        hint = "that counts bytes where there are bits: 4 bit are half a byte"
    return verdict(stub, n_parameters * n_bits / 8 / 2**30, "GiB of weights", hint, tolerance=0.01)


def check_cache_bytes(stub, n_layers: int, hidden: int, bytes_per_value: int) -> bool:
    """KV cache of one token: a key and a value of `hidden` numbers in every layer."""
    want = 2 * n_layers * hidden * bytes_per_value
    hint = "each layer keeps a key and a value" if stub == want // 2 else "2 × layers × hidden × bytes of one number"
    return verdict(stub, want, "cache bytes per token", hint)


def check_kept_by_top_p(stub, probabilities: list[float], top_p: float) -> bool:
    """How many tokens nucleus sampling keeps: the fewest, largest first, that reach `top_p` together."""
    sums = accumulate(sorted(probabilities, reverse=True))
    kept = 1 + sum(total < top_p for total in sums)
    hint = "add the largest probabilities until top_p is reached; the one that reaches it stays"
    return verdict(stub, kept, "tokens kept", hint)
