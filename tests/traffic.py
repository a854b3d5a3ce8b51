"""Launches and bytes of a call: plain torch, Triton's kernels in the interpreter, the host code of csrc."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CSRC = Path(__file__).parent.parent / "csrc"
#: Operators of ATen that run no kernel, besides views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "promote_types"}


class Traffic(TorchDispatchMode):
    """The traffic of the block, if each launch reads every byte that it needs once and writes every result once.

    That is the least for ATen's operators, some of which are several kernels on a GPU. For a Triton kernel, counted
    within `triton_traffic`, it is the distinct addresses that its loads and its stores name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            read = () if name.endswith("_like") else (args, kwargs)
            self.add(sum(map(_distinct_bytes, _tensors((read, result)))))
        return result

    def add(self, nbytes: int) -> None:
        self.launches += 1
        self.bytes += nbytes


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _distinct_bytes(tensor: Tensor) -> int:
    strided = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * int(np.prod([size for size, stride in strided if stride != 0]))


@contextmanager
def triton_traffic(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block, every launch of a Triton kernel in the interpreter adds to `traffic`."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    touched: list[tuple[str, int, Any]] = []  # read or written, bytes of an element, addresses
    run = InterpretedFunction.run

    def counted_run(*args: Any, **kwargs: Any) -> None:
        touched.clear()
        with _disable_current_modes():
            run(*args, **kwargs)
        total = 0
        for kind in {(how, size) for how, size, _ in touched}:
            addresses = np.concatenate([where for *of, where in touched if tuple(of) == kind])
            total += kind[1] * len(np.unique(addresses))
        traffic.add(total)

    def watched(how: str, access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            pointers, mask = args[0], args[mask_at]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            touched.append((how, size, np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel()))
            return access(self, *args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", counted_run)
        for name, how, mask_at in (("create_masked_load", "read", 1), ("create_masked_store", "written", 2)):
            patch.setattr(InterpreterBuilder, name, watched(how, getattr(InterpreterBuilder, name), mask_at))
        yield


def cuda_launches(op: str, function: str) -> list[str] | None:
    """Return the kernels on that path through a host function which launches most; None where no kernel is for GPUs."""
    path = CSRC / op / "cuda.cu"
    if not path.exists():
        return None
    source = re.sub(r"//.*", "", path.read_text())
    found = re.search(rf"^void {function}\([^{{;]*\{{", source, re.MULTILINE)
    assert found is not None, f"{path} has no function {function}"
    launched, _ = _HostCode(source, found.end()).block()
    return launched


class _HostCode:
    """A reader of the control flow that decides what is launched: blocks, if, else and return."""

    TOKEN = re.compile(r"<<<|\{|\}|\bif (?:constexpr )?\(|\breturn\b|;")

    def __init__(self, source: str, at: int) -> None:
        self.source, self.at = source, at

    def block(self) -> tuple[list[str], bool]:
        """From behind an opening brace to behind its closing one: what is launched, and whether it returns."""
        launched: list[str] = []
        returns = False
        while (token := self._next()) != "}":
            if token == "return":
                returns = True
            elif not token.startswith("if"):
                launched += self._token(token)
            else:
                then, then_returns, otherwise = self._if()
                if then_returns:
                    rest, returns = self.block()
                    return launched + max(then, otherwise + rest, key=len), returns
                launched += max(then, otherwise, key=len)
        return launched, returns

    def _next(self) -> str:
        found = self.TOKEN.search(self.source, self.at)
        assert found is not None, "the source ends within a block"
        self.before, self.at = found.start(), found.end()
        return found.group()

    def _token(self, token: str) -> list[str]:
        if token == "<<<":
            return [self._kernel()]
        return self.block()[0] if token == "{" else []

    def _kernel(self) -> str:
        """The name in front of <<<: name, name<...> or (a ? name<...> : name<...>)."""
        start = max(self.source.rfind(end, 0, self.before) for end in ";{}")
        found = re.search(r"(\w+)(<.*>)?\)?\s*$", self.source[start + 1 : self.before], re.DOTALL)
        assert found is not None
        return found.group(1)

    def _if(self) -> tuple[list[str], bool, list[str]]:
        """Both branches, and whether the first returns."""
        depth = 1
        while depth:
            depth += {"(": 1, ")": -1}.get(self.source[self.at], 0)
            self.at += 1
        then, returns = self._branch()
        otherwise: list[str] = []
        found = re.compile(r"\s*else\b").match(self.source, self.at)
        if found is not None:
            self.at = found.end()
            otherwise, _ = self._branch()
        return then, returns, otherwise

    def _branch(self) -> tuple[list[str], bool]:
        token = self._next()
        if token == "{":
            return self.block()
        if token == "return":
            return self._statement(), True
        if token.startswith("if"):
            then, returns, otherwise = self._if()
            return max(then, otherwise, key=len), returns
        return (self._token(token) + self._statement() if token != ";" else []), False

    def _statement(self) -> list[str]:
        """To behind the semicolon."""
        launched: list[str] = []
        while (token := self._next()) != ";":
            launched += self._token(token)
        return launched
