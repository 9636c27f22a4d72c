"""Paged optimizer states that stay paged when a run is resumed or a step is done again.

A paged optimizer keeps its states in memory that the driver moves between card and host (QLoRA
paper, section 3). bitsandbytes pages a state of at least 100,000 numbers (`optim/optimizer.py`,
`Optimizer8bit.get_state_buffer`), but its `load_state_dict` moves every state onto the card with
`.to(device)`, where it is a plain tensor from then on; the pages it lay in are never given back,
because bitsandbytes has no call for that. So states are loaded here into pages, the old ones where
there are any. For pythia-12b with rank 64 that is 1.4 GiB, needed just when memory has run out.
"""

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from qlora_nb.model import device

STATES = ("state1", "state2")
"""Adam's two running means, as bitsandbytes names them."""


def keep_paged(optimizer: torch.optim.Optimizer) -> None:
    """Let a bitsandbytes optimizer load states into pages; any other optimizer is left as it is."""
    if not isinstance(optimizer, Optimizer8bit):
        return
    if optimizer.is_paged and not device.on_gpu():
        print("no GPU here: there is nothing to page, the optimizer's states lie in main memory")
        optimizer._cpu_paged_warned = True  # bitsandbytes' own warning of that

    def load_state_dict(state_dict: dict) -> None:
        before = dict(optimizer.state)
        Optimizer8bit.load_state_dict(optimizer, state_dict, move_to_device=False)
        for parameter, state in optimizer.state.items():
            old = before.get(parameter, {})
            for name, value in state.items():
                if name in STATES:
                    buffer = old.get(name)
                    if buffer is None or buffer.dtype != value.dtype:
                        buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                    state[name] = buffer.copy_(value)
                elif torch.is_tensor(value):
                    state[name] = value.to(parameter.device)

    optimizer.load_state_dict = load_state_dict


def begin_anew(optimizer: torch.optim.Optimizer) -> None:
    """Set all states to those before the first step, in the memory they have: zeros, and a step
    count of zero.
    """
    for state in optimizer.state.values():
        if isinstance(optimizer, Optimizer8bit) and not all(name in state for name in STATES):
            state.clear()  # memory ran out while this one was made
        for name, value in state.items():
            if not torch.is_tensor(value):
                state[name] = 0
            elif not name.startswith("qmap"):  # the 8-bit code tables stay
                value.zero_()
