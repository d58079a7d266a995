"""CUDA graphs on the CPU: the operations of a capture, run again over the same tensors. What a graph would miss, such
as a tensor that was exchanged for another one, a replay here misses too.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    captured = 0  # of all

    def __init__(self):
        self.calls = []
        Graph.captured += 1

    def replay(self):
        for function, args, kwargs, found in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot read a tensor")
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        found = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, found))
        return found


@contextmanager
def _capture(graph):
    with _Recorder(graph) as recorder:
        yield
    for tensor, value in reversed(recorder.before):  # a capture runs nothing
        tensor.copy_(value)


@pytest.fixture
def replayed(monkeypatch):
    """Decode steps of float32 models on the CPU are replayed, over the decode kernel's oracle. Returns `Graph`, which
    counts captures.
    """
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr("elastic.cache.decode_attention.unsupported_reason", lambda *_: None)
    monkeypatch.setattr("elastic.inference.serving.batch.can_graph", lambda *_: True)
    monkeypatch.setattr(Graph, "captured", 0)
    return Graph
