"""Which adapter has which slot on the device, and whether another can have one.

Owns the slots' assignment: an adapter keeps its slot while a running sequence needs it, and after that until the slot
is needed for another, least recently used first. Knows no tensors: what is to be copied where is told with the step.
"""

from __future__ import annotations

from collections import OrderedDict

from raydata_llm.engine.prefix_cache import ROOT
from raydata_llm.engine.request import LoRARequest

NO_ADAPTER = -1


class AdapterPool:
    """`num_slots` slots; 0 refuses all adapters."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[LoRARequest, int] = {}
        self._users: dict[LoRARequest, int] = {}
        self._unused: OrderedDict[LoRARequest, None] = OrderedDict()
        self._loads: list[tuple[int, LoRARequest]] = []
        self._roots: dict[LoRARequest, int] = {}

    @property
    def in_use(self) -> bool:
        """Whether a running sequence has an adapter."""
        return bool(self._users)

    @property
    def num_available(self) -> int:
        """Slots that another adapter can have now."""
        return len(self._free) + len(self._unused)

    def has(self, adapter: LoRARequest) -> bool:
        """Whether it has a slot."""
        return adapter in self._slot_of

    def root(self, adapter: LoRARequest | None) -> int:
        """Where the prefix cache keeps the KV of its sequences."""
        return ROOT if adapter is None else self._roots.setdefault(adapter, -1 - len(self._roots))

    def has_room(self, adapter: LoRARequest | None) -> bool:
        """Whether a sequence with it can run now."""
        return adapter is None or adapter in self._slot_of or bool(self._free or self._unused)

    def acquire(self, adapter: LoRARequest | None) -> int:
        """The adapter's slot, for a sequence that begins to run; NO_ADAPTER for none."""
        if adapter is None:
            return NO_ADAPTER
        if adapter not in self._slot_of:
            if not self._free:
                self._free.append(self._slot_of.pop(self._unused.popitem(last=False)[0]))
            self._slot_of[adapter] = self._free.pop()
            self._loads.append((self._slot_of[adapter], adapter))
        self._unused.pop(adapter, None)
        self._users[adapter] = self._users.get(adapter, 0) + 1
        return self._slot_of[adapter]

    def release(self, adapter: LoRARequest | None) -> None:
        """A sequence with it runs no more."""
        if adapter is None:
            return
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter]
            self._unused[adapter] = None

    def take_loads(self) -> list[tuple[int, LoRARequest]]:
        """What is to be copied to which slot before the next step."""
        loads, self._loads = self._loads, []
        return loads

    def forget(self) -> None:
        """Take all slots for empty; no running sequence has an adapter."""
        assert not self._users, "a running sequence needs its adapter"
        self._free += self._slot_of.values()
        self._slot_of.clear()
        self._unused.clear()
        self._loads.clear()

    def check_integrity(self) -> None:
        """Assert that each slot is free, in use or kept, and exactly one of these."""
        assert self._users.keys() | self._unused.keys() == self._slot_of.keys()
        assert not self._users.keys() & self._unused.keys()
        slots = [*self._free, *self._slot_of.values()]
        assert len(set(slots)) == len(slots)
