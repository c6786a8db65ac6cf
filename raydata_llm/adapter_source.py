"""What a user names as a LoRA adapter, turned into a folder on this node.

Owns the meaning of its path: a local folder, a Hub id, or a remote folder such as `s3://...`. Knows no tensors.
"""

from __future__ import annotations

import dataclasses
import functools

from raydata_llm.engine.request import LoRARequest
from raydata_llm.model_cache import fetch_model
from raydata_llm.model_source import fetch_from_hub, is_remote, local_path
from raydata_llm.redaction import redact


def on_this_node(adapter: LoRARequest) -> LoRARequest:
    """The request with a local path.

    Raises:
        ValueError: when there is nothing to read there.
    """
    return dataclasses.replace(adapter, lora_path=resolve_adapter(adapter.lora_path))


@functools.lru_cache(maxsize=1024)
def resolve_adapter(lora_path: str) -> str:
    """The local folder of an adapter, fetched once a node if it is remote.

    Raises:
        ValueError: when there is nothing to read there, with the remedy.
    """
    try:
        if is_remote(lora_path):
            return fetch_model(lora_path, weights=True)
        folder = local_path(lora_path)
        return str(folder) if folder.exists() else fetch_from_hub(lora_path, weights=True, load_format="auto")
    except ValueError as error:
        raise ValueError(f"lora_path={redact(lora_path)!r} cannot be read: {error}") from error
