"""Memory that a device has left."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int | None:
    """Count the bytes that this process can still take on a CUDA device; None on any other.

    The process's own cache counts as free, and a limit set by ``torch.cuda.set_per_process_memory_fraction`` holds.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free, max(0, limit - reserved)) + reserved - allocated
