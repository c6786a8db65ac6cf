"""What a user names as a LoRA adapter, turned into a folder on this node.

Owns the meaning of its path: a local folder, a Hub id, or a remote folder such as `s3://...`. Knows no tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import os

from raydata_llm.adapter_names import check_inside
from raydata_llm.engine.request import LoRARequest
from raydata_llm.model_cache import fetch_model
from raydata_llm.model_source import fetch_from_hub, is_remote, local_path, named_as


def on_this_node(adapter: LoRARequest, root: str = "") -> LoRARequest:
    """The request with a local path.

    Args:
        adapter: The program's, or a row's.
        root: Of a row's: the folder that it may not lead out of.

    Raises:
        ValueError: when there is nothing to read there, or it is out of bounds.
    """
    if root:
        folder = local_path(adapter.lora_path)
        # No name is too long for this question, unlike Path.is_dir's.
        if not os.path.isdir(folder):
            # It is not looked for anywhere else: a folder's name may be a stranger's on the Hub.
            raise ValueError(f"lora_path={adapter.lora_path!r} not found: there is no such folder on this node")
        check_inside(str(folder), root)
    return dataclasses.replace(adapter, lora_path=resolve_adapter(adapter.lora_path))


@functools.lru_cache(maxsize=1024)
def resolve_adapter(lora_path: str) -> str:
    """The local folder of an adapter, fetched once a node if it is remote.

    Raises:
        ValueError: when there is nothing to read there, with the remedy.
    """
    with named_as("lora_path"):
        if is_remote(lora_path):
            return fetch_model(lora_path, weights=True)
        folder = local_path(lora_path)
        return str(folder) if os.path.exists(folder) else fetch_from_hub(lora_path, weights=True, load_format="auto")
