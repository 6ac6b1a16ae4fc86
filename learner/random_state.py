"""The state of torch's random numbers, which only the dropout of adapters draws while training."""

import torch


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this process and of its device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Go on from what `random_state` has returned; the part of a device that is not there is left out."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
