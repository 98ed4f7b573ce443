"""Put the state of a paged optimizer, loaded from a file, into managed memory again."""

from typing import Any

import torch


def page_again(optimizer: Any) -> None:
    """Give the state of bitsandbytes' paged optimizers the memory that new state would get. Loaded, it is plain host
    memory that is still marked as paged, so bitsandbytes would not move it to the card. Do nothing for other
    optimizers."""
    bare = getattr(optimizer, "optimizer", optimizer)
    if not getattr(bare, "is_paged", False):
        return
    bare.page_mng.paged_tensors.clear()
    for parameter, state in bare.state.items():
        for name in ("state1", "state2"):
            if torch.is_tensor(state.get(name)):
                state[name] = bare.get_state_buffer(parameter, dtype=state[name].dtype).copy_(state[name])
