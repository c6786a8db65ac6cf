"""What Ray reserves for a replica, as users write it: one bundle of resources, or a placement group's.

Owns the check of its shape. Knows no cluster: what is free is the pool's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydata_llm.engine.regular_file import shown

# A memory of bytes is the largest of them.
_MOST = 2**60
_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def bundle_resources(value: object, field: str) -> dict[str, float]:
    """A bundle: resource name to amount.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f'{field}={value!r} is not valid: give resources and amounts, such as {{"GPU": 1, "CPU": 2}}')
    for name, amount in value.items():
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount <= _MOST:
            raise ValueError(f"{field}[{name!r}]={shown(amount)} is not valid: give 0, or a number up to 2**60")
    if value.get("GPU", 0) > 1:
        raise ValueError(f"{field}['GPU']={value['GPU']!r} is not supported yet: a rank runs on one GPU")
    return {str(name): float(amount) for name, amount in value.items()}


def placement_group(value: object) -> dict[str, Any]:
    """A placement group of one bundle for all ranks or one for each, with what was left out, as Ray Data LLM reads it.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    field = "placement_group_config"
    if not isinstance(value, Mapping):
        raise ValueError(f'{field}={value!r} is not valid: give {{"bundle_per_worker": {{"GPU": 1}}}}')
    unknown = sorted(set(map(str, value)) - {"bundle_per_worker", "bundles", "strategy"})
    if unknown:
        raise ValueError(f"{field}[{unknown[0]!r}] is not a setting: known are bundle_per_worker, bundles and strategy")
    per_worker, bundles = value.get("bundle_per_worker"), value.get("bundles")
    if (per_worker is None) == (bundles is None):
        raise ValueError(f"{field}={value!r} is not valid: give one of bundle_per_worker and bundles")
    strategy = value.get("strategy") or "PACK"
    if strategy not in _STRATEGIES:
        raise ValueError(f"{field}['strategy']={strategy!r} is not valid: choose one of {', '.join(_STRATEGIES)}")
    if bundles is not None and (not isinstance(bundles, (list, tuple)) or not bundles):
        raise ValueError(f"{field}['bundles']={bundles!r} is not valid: give a list, one bundle for each rank")
    checked = [bundle_resources(one, f"{field} bundle") for one in ([per_worker] if bundles is None else bundles)]
    return {
        "bundle_per_worker": checked[0] if bundles is None else None,
        "bundles": None if bundles is None else checked,
        "strategy": strategy,
    }
