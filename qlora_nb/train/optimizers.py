"""Optimizer states that stay where they belong when a run is resumed or a step is done again.

bitsandbytes pages a state of at least 100,000 numbers (`optim/optimizer.py`,
`Optimizer8bit.get_state_buffer`), but its `load_state_dict` moves every state onto the card with
`.to(device)`, where it is a plain tensor from then on; the pages it lay in are never given back,
because bitsandbytes has no call for that. So states are loaded here into pages, the old ones where
there are any. For pythia-12b with rank 64 that is 1.4 GiB, needed just when memory has run out.
"""

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

STATES = ("state1", "state2")
"""Adam's two running means, as bitsandbytes names them."""


def keep_paged(optimizer: torch.optim.Optimizer) -> None:
    """Let a bitsandbytes optimizer load states into pages; any other optimizer is left as it is."""
    if not isinstance(optimizer, Optimizer8bit):
        return

    def load_state_dict(state_dict: dict) -> None:
        before = dict(optimizer.state)
        Optimizer8bit.load_state_dict(optimizer, state_dict, move_to_device=False)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if name in STATES:
                    state[name] = _buffer(
                        optimizer, parameter, before.get(parameter, {}).get(name), value
                    )
                elif torch.is_tensor(value):
                    state[name] = value.to(parameter.device)

    optimizer.load_state_dict = load_state_dict


def _buffer(
    optimizer: Optimizer8bit, parameter: torch.Tensor, old: torch.Tensor | None, value: torch.Tensor
) -> torch.Tensor:
    """`value` in the buffer that held this state before, or in a new one from bitsandbytes, paged
    where it pages.
    """
    if old is None or old.dtype != value.dtype:
        old = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    return old.copy_(value)


def begin_anew(optimizer: torch.optim.Optimizer) -> None:
    """All states as before the first step, in the memory they have: zeros and a step count of
    zero.
    """
    for state in optimizer.state.values():
        if isinstance(optimizer, Optimizer8bit) and not all(name in state for name in STATES):
            state.clear()  # memory ran out while this one was made
        for name, value in state.items():
            if not torch.is_tensor(value):
                state[name] = 0
            elif not name.startswith("qmap"):  # the 8-bit code tables stay
                value.zero_()
