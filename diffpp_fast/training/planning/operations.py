"""Operations, counted with torch's formulas: two for each multiplication and addition of a product of matrices."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Adds up what matrix products, convolutions and attention do while the mode is on, backward passes included.

    As `FlopCounterMode`, whose hooks on modules do not go with `torch.autograd.grad`. Norms, activations, noise and
    optimizers are not counted: memory, not arithmetic, is their measure.

    Attributes:
        by_dtype: operations by the dtype of what they multiply.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            dtype = next(value.dtype for value in args if isinstance(value, Tensor))
            self.by_dtype[dtype] += int(formula(*args, **kwargs, out_val=result))
        return result
