"""A rank's model as a torch module: its parameters by name, for functions that users run on them.

Owns the tree of modules. The tensors are the decoder's own, so what is written into one in place is what the next step
reads; the modules compute nothing, and hooks on them are never called. Names are Hugging Face's, with q, k and v and
gate and up side by side, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class ModelView(torch.nn.Module):
    """See the module's docstring.

    Args:
        parameters: By dotted name.
        config: The rank's part of the model's config.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], config: Any) -> None:
        super().__init__()
        self.config = config
        for name, tensor in parameters.items():
            *path, last = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.ModuleList() if part == "layers" else torch.nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
