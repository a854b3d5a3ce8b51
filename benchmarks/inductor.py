"""torch.compile's own kernels for a GPU that is not there: the code that it would run in the operators' place.

The graphs are those that torch traces on the CPU; their nodes are then told that their tensors are on a GPU, whose
properties are supplied, and inductor makes its code for it. Its kernels are compiled ahead of time and walked; the
code around them runs on tensors of the CPU, in which nothing is computed. Where inductor would time several block
sizes, that with the fewest instructions stands for its choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_build
from benchmarks.launches import Launch, triton_launch

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
GPU = torch.device("cuda", 0)


@contextmanager
def compiling(arch: int, multiprocessors: int, launched: Callable[[Sequence[Launch]], None]) -> Iterator[Compile]:
    """Yield what stands for `torch.compile`; `launched` takes each launch, once for each choice of blocks.

    Args:
        arch: the GPU's.
        multiprocessors: how many it has.
        launched: what takes launches.
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import async_compile, config
    from torch._inductor.runtime import hints, triton_helpers
    from triton.runtime import driver

    properties = SimpleNamespace(
        name="GPU", multi_processor_count=multiprocessors, major=arch // 10, minor=arch % 10, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        total_memory=2**37, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20, gcnArchName="",
    )  # fmt: skip
    driver.set_active(gpu_build.NamedGpu(arch))
    hints.DeviceProperties.create.cache_clear()
    kernels = _Kernels(arch, launched)
    supplied = {
        (CudaInterface, "get_device_properties"): staticmethod(lambda device=None: properties),
        (CudaInterface, "get_compute_capability"): staticmethod(lambda device=None: arch),
        (CudaInterface, "is_available"): staticmethod(lambda: True),
        (CudaInterface.Worker, "get_device_properties"): staticmethod(lambda device=None: properties),
        (CudaInterface.Worker, "current_device"): staticmethod(lambda: 0),
        (CudaInterface, "current_device"): staticmethod(lambda: 0),
        (torch.cuda, "get_device_capability"): lambda device=None: (arch // 10, arch % 10),
        (torch.cuda, "get_device_properties"): lambda device=None: properties,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "device_count"): lambda: 1,
        (torch.version, "cuda"): "13.0",
        (triton_helpers, "set_driver_to_gpu"): lambda: None,
        (async_compile.AsyncCompile, "triton"): kernels.add,
        (async_compile.AsyncCompile, "wait"): lambda self, scope: None,
    }
    with ExitStack() as stack:
        for (owner, name), value in supplied.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False, joint_graph_constant_folding=False))
        torch._dynamo.reset()
        yield lambda function: torch.compile(function, backend=_backend, dynamic=False, fullgraph=True)
        torch._dynamo.reset()


def _backend(graph: Any, inputs: Sequence[Any]) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    def partition(joint: Any, arguments: Any, **options: Any) -> Any:
        with V.set_fake_mode(_to_gpu(joint)):
            _recursive_joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, arguments, compiler="inductor", **options)

    def compiler(is_backward: bool, is_inference: bool) -> Callable[[Any, Sequence[Any]], Any]:
        return lambda traced, _: _generated(traced, is_backward, is_inference)

    return aot_autograd(
        fw_compiler=compiler(False, False),
        bw_compiler=compiler(True, False),
        inference_compiler=compiler(False, True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )(graph, inputs)


def _to_gpu(traced: Any) -> Any:
    """Tell the nodes of a graph that they are on the GPU. Return the mode of their fake tensors."""
    mode = None
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        found = torch.utils._pytree.tree_leaves(value)
        mode = next((each.fake_mode for each in found if isinstance(each, torch._subclasses.FakeTensor)), mode)
        if mode is not None:
            node.meta["val"] = torch.utils._pytree.tree_map_only(
                torch._subclasses.FakeTensor, partial(_fake, mode), value
            )
        node.args = torch.utils._pytree.tree_map_only(torch.device, lambda device: GPU, node.args)
        node.kwargs = torch.utils._pytree.tree_map_only(torch.device, lambda device: GPU, node.kwargs)
    return mode


def _fake(mode: Any, tensor: Tensor) -> Any:
    with mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=GPU)


def _generated(traced: Any, is_backward: bool, is_inference: bool) -> Callable[..., Any]:
    """Return inductor's code for a graph, to be called with tensors on the CPU."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = _to_gpu(traced)
    view_to_reshape(traced)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        if is_inference:
            _recursive_joint_graph_passes(traced)
        _recursive_post_grad_passes(traced, is_inference=is_inference)
        fakes = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
        graph = GraphLowering(traced, example_inputs=fakes, is_inference=is_inference, is_backward=is_backward)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*fakes)
            code, _ = graph.codegen()
    scope: dict[str, Any] = {"__name__": "generated"}
    exec(compile(_on_cpu(code.value), "generated", "exec"), scope)
    call = scope["call"]
    boxed: Callable[..., Any] = make_boxed_func(lambda *arguments: call(list(arguments)))
    return boxed


def _on_cpu(code: str) -> str:
    """Return the code around the kernels without what only a GPU has."""
    code = re.sub(
        r"^from torch\._C import _cuda_getCurrentRawStream.*$", "get_raw_stream = lambda device: 0", code, flags=re.M
    )
    code = re.sub(
        r"^empty_strided_cuda = .*$",
        "empty_strided_cuda = lambda *of: torch.empty_strided(of[0], of[1], dtype=of[2])",
        code,
        flags=re.M,
    )
    code = code.replace("with torch.cuda._DeviceGuard(0):", "if True:").replace("torch.cuda.set_device(0)", "pass")
    return re.sub(r"device=(torch\.)?device\([^)]*\)", "device='cpu'", code)


class _Kernels:
    """Makes objects of the code of kernels, as inductor's AsyncCompile does."""

    def __init__(self, arch: int, launched: Callable[[Sequence[Launch]], None]) -> None:
        self.arch, self.launched = arch, launched

    @property
    def add(self) -> Callable[..., Any]:
        def triton(_: Any, name: str, source: str, device_str: str = "cuda") -> _Kernel:
            from torch._inductor.codecache import PyCodeCache

            return _Kernel(getattr(PyCodeCache.load(source), name), name, self)

        return triton


class _Kernel:
    """One of inductor's kernels: the code around it calls `run`."""

    def __init__(self, tuner: Any, name: str, kernels: _Kernels) -> None:
        self.tuner, self.name, self.kernels = tuner, name, kernels
        self.compiled: list[tuple[Any, Any]] = []

    def run(self, *arguments: Any, stream: Any = None, **_: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr, config_to_dict

        if not self.compiled:
            self.compiled = [(self._compile(each), each) for each in self.tuner.configs]
        fn = self.tuner.fn
        found = []
        for compiled, each in self.compiled:
            blocks = config_to_dict(each)
            names = [name for name in fn.arg_names if name not in blocks]
            named = dict(zip(names, arguments, strict=False))
            grid = GridExpr.from_meta(self.tuner.inductor_meta, each).eval_slow({**blocks, **named})
            found.append(triton_launch(f"compile.{self.name}", compiled, {**named, **blocks}, grid))
        self.kernels.launched(found)

    def _compile(self, each: Any) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        meta = self.tuner._create_compile_meta(each)
        source = ASTSource(self.tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        options = self.tuner._create_compile_options(each, meta)
        return triton.compile(source, target=GPUTarget("cuda", self.kernels.arch, 32), options=options)
