"""Bytes on meta: every storage that operations make, from its birth to its death, by who owns it."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts what is alive of all that operations allocate while the mode is on.

    Storages count once and whole, however many tensors lie in them. What was there before, such as parameters, does
    not count, and neither does a view of it. Tensors on meta live and die as they would on a device: autograd keeps
    them, checkpointing drops and remakes them, and a freed graph frees them.

    Attributes:
        owner: whom new storages belong to.
        alive: bytes alive by owner.
        peak: the most bytes alive at once since `restart`.
        at_peak: `alive` at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner = ""
        self.alive: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._total = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def restart(self) -> None:
        """Forgets the peak; what is alive now is the least that the next one can be."""
        self.peak, self.at_peak = self._total, Counter(self.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta and _key(tensor) not in given:
                self._born(tensor)
        return result

    def _born(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        owner, size = self.owner, storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._died, key, owner, size)
        self.alive[owner] += size
        self._total += size
        if self._total > self.peak:
            self.restart()

    def _died(self, key: int, owner: str, size: int) -> None:
        del self._known[key]
        self.alive[owner] -= size
        self._total -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
