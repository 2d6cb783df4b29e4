"""Every script of the gallery starts as a new process would: no parameters, no seed, float32."""

from typing import Any


def reset(gallery_conf: dict[str, Any], script: str) -> None:
    """Undo what an earlier script in the same process may have left."""
    import pyro
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    pyro.enable_validation(True)
