"""What a launcher asks of a device."""

import torch


def limits(device: torch.device, interpreter: int = 2**31) -> tuple[int, int]:
    """Shared memory of a block in bytes, and multiprocessors.

    In the interpreter the latter is ``interpreter``: many multiprocessors ask for small tiles,
    which are fast there, and one asks for no more programs than the work needs.
    """
    if device.type != "cuda":
        return 64 * 1024, interpreter
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return shared or properties.shared_memory_per_block, properties.multi_processor_count
