"""A pretended GPU: what this project does on CUDA alone runs on any machine.

A tensor of class Cuda says that it is on cuda:0 and keeps its numbers in a CPU tensor. Every operation on one comes to
`run`, which computes it on the CPU and minds what a GPU minds:

    - tensors of two devices in one operation are an error
    - where the CPU would wait for the GPU, that line is noted; while a graph is captured it is an error
    - of each call of attention is noted which kernel CUDA would choose, and its output has that kernel's layout
    - a captured graph repeats its operations on the tensors of its capture, and the capture itself computes nothing

It cannot see rounding (it adds up as a CPU does), speed, memory, streams (an operation is done when its call returns),
collectives (it is one process), nor what only a kernel itself refuses. Those need a real GPU: test_cuda.py.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
# Before torch is patched: this takes stock of torch's functions.
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
SIZE_UNKNOWN = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
                aten.repeat_interleave.Tensor, aten.unique_consecutive.default, aten.equal.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Seen:
    """What happened since `pretended_gpu` was entered."""

    waits = Counter()     # "operation at file:line function" -> how often the CPU waited there for the GPU
    kernels = Counter()   # kernel -> calls of attention
    graphs = []           # in the order of their capture
    capturing = False     # the last of them is being captured


class Cuda(torch.Tensor):
    """A tensor that says it is on cuda:0; its numbers are in a CPU tensor, `numbers`."""

    @staticmethod
    def __new__(cls, numbers):
        # To C++ it is on "meta": a torch without CUDA has no autograd for a GPU.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype, device="meta")

    def __init__(self, numbers):
        self.numbers = numbers

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def tolist(self):
        note_wait("tolist")
        return self.numbers.tolist()

    def __repr__(self):
        note_wait("repr")
        return f"Cuda({self.numbers})"


class Dispatch(TorchDispatchMode):
    """Finds all operations that concern the GPU, those that create tensors there included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, DTensor) for x in leaves):
            # It comes back with the local tensors.
            return NotImplemented
        concerned = goes_to_gpu(kwargs) or any(isinstance(x, Cuda) for x in leaves)
        # Inside `with torch.device("meta")`, a tensor is in truth one of shape only.
        if not concerned or torch.get_default_device().type == "meta":
            return function(*args, **kwargs)
        # In inference mode some operations come whole that come in parts elsewhere.
        with self:
            parts = function.decompose(*args, **kwargs)
        return run(function, args, kwargs) if parts is NotImplemented else parts


def goes_to_gpu(kwargs) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type in ("cuda", "meta")


def run(function, args, kwargs):
    """One operation on tensors of the GPU: noted or refused as there, and computed on the CPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    from_gpu = any(isinstance(x, Cuda) for x in tensors)
    to_gpu = goes_to_gpu(kwargs) or (from_gpu and kwargs.get("device") is None)
    # A tensor without dimensions is a number, which may come from the CPU.
    mixed = from_gpu and any(x.dim() > 0 for x in tensors if not isinstance(x, Cuda))
    if mixed and function not in INDEXING | {aten.copy_.default}:
        raise RuntimeError(f"{function} of tensors on cuda and cpu at {place()}")
    copied = function is aten._to_copy.default and isinstance(args[0], Cuda) != to_gpu
    by_mask = function in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
    if mixed or copied or by_mask or function in SIZE_UNKNOWN:
        note_wait(function)

    cpu_args, cpu_kwargs = tree_map_only(Cuda, attrgetter("numbers"), (args, kwargs))
    if goes_to_gpu(kwargs):
        cpu_kwargs["device"] = torch.device("cpu")
    do = Seen.graphs[-1].record if Seen.capturing else compute
    output = do(function, cpu_args, cpu_kwargs)
    if not to_gpu:
        return output
    return return_and_correct_aliasing(function, args, kwargs, tree_map_only(torch.Tensor, Cuda, output))


def compute(function, args, kwargs):
    """The operation itself, on tensors of the CPU."""
    if function in (aten.mm.dtype, aten.bmm.dtype):
        # A CPU has no products with out_dtype.
        a, b, dtype = args
        return torch.matmul(a.to(dtype), b.to(dtype))
    return function(*args, **kwargs)


def note_wait(what):
    if Seen.capturing:
        raise RuntimeError(f"{what} at {place()} while a graph is captured")
    Seen.waits[f"{what} at {place()}"] += 1


def place() -> str:
    """The innermost line that led here, outside of torch and of this file."""
    frame = sys._getframe()
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []    # (function, args, kwargs, output) with tensors of the CPU

    def record(self, function, args, kwargs):
        """The output of an operation: memory that only `replay` fills."""
        output = args[0]
        if not function._schema.is_mutable:
            output = compute(function, args, kwargs)
            for tensor in tree_leaves(output):
                if tensor.is_floating_point() and not function.is_view:
                    tensor.fill_(torch.nan)
        self.operations.append((function, args, kwargs, output))
        return output

    def replay(self):
        for function, args, kwargs, output in self.operations:
            for old, new in zip(tree_leaves(output), tree_leaves(compute(function, args, kwargs))):
                # Views, and what is changed in place, are the old memory already.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capture(graph, **_):
    """In the place of torch.cuda.graph."""
    Seen.graphs.append(graph)
    Seen.capturing = True
    try:
        yield
    finally:
        Seen.capturing = False


plain_attention = F.scaled_dot_product_attention
plain_data = torch.Tensor.data
plain_init_process_group = dist.init_process_group


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Torch's plain attention in the layout of CUDA's fused kernels: (B, heads, S, E) lies as (B, S, heads, E)."""
    output = plain_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if q.is_cuda:
        Seen.kernels[choose_kernel(q, k, attn_mask, is_causal, enable_gqa)] += 1
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output


def choose_kernel(q, k, mask, causal: bool, grouped: bool) -> str:
    """The first enabled kernel that can do it, in the order of torch 2.13 on an H100 (sdp_utils.cpp)."""
    enabled = torch.backends.cuda
    equal_heads = q.shape[1] == k.shape[1]
    width = q.shape[-1]
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        raise RuntimeError("invalid dtype for bias - should match query's dtype")
    if q.dtype == torch.bfloat16 and (equal_heads or grouped):
        if enabled.cudnn_sdp_enabled() and width <= 128 and width % 8 == 0:
            return "cudnn"
        if enabled.flash_sdp_enabled() and width <= 256 and mask is None:
            return "flash"
    if enabled.mem_efficient_sdp_enabled() and equal_heads and width % 8 == 0 and not (causal and mask is not None):
        padded = mask is not None and any(stride % 8 for stride in mask.stride()[:-1])
        return "efficient, with a copy of the mask" if padded else "efficient"
    if not enabled.math_sdp_enabled():
        raise RuntimeError("No available kernel. Aborting execution.")
    return "math"


def set_data(tensor, source):
    """`tensor.data = source`, also where that takes a tensor from the CPU to the GPU."""
    if isinstance(source, Cuda) and not isinstance(tensor, Cuda):
        if isinstance(tensor, torch.nn.Parameter):
            source = torch.nn.Parameter(source, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, source)
    else:
        plain_data.__set__(tensor, source)


def init_process_group(backend, **more):
    plain_init_process_group(backend.replace("nccl", "gloo"), **more)


@contextmanager
def pretended_gpu():
    """Inside, torch has one GPU; yields its device and begins to note what is `Seen`."""
    for notes in (Seen.waits, Seen.kernels, Seen.graphs):
        notes.clear()
    if torch.cuda.is_available():
        # To C++ the real GPU counts as started from here on, so it must be.
        torch.cuda.init()
    unused = mock.MagicMock()
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=80e9), "CUDAGraph": Graph, "graph": capture,
        "is_current_stream_capturing": lambda: Seen.capturing,
        **dict.fromkeys(("_lazy_init", "set_device", "Stream", "Event", "current_stream", "stream"), unused)}
    with ExitStack() as stack:
        for owner, values in (
            (torch.cuda, cuda),
            (torch, {"_has_compatible_shallow_copy_type": lambda *_: True}),
            (torch._C, {"_get_accelerator": lambda *_: GPU}),
            (torch.accelerator, {"current_stream": unused}),
            (torch.Tensor, {"data": property(plain_data.__get__, set_data)}),
            (DTensor, {"device": property(lambda self: GPU), "is_meta": property(lambda self: False)}),
            (F, {"scaled_dot_product_attention": attention}),
            (dist, {"init_process_group": init_process_group}),
        ):
            stack.enter_context(mock.patch.multiple(owner, **values))
        # torch.tensor(..., device="cuda") then makes a tensor of the CPU and copies it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(Dispatch())
        yield GPU
