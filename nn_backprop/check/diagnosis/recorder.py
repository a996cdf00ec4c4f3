"""Recording a forward: every primitive operation that it runs; broadcasting is one."""

import linecache
import os
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
)
from torch.utils._pytree import tree_flatten, tree_leaves

from nn_backprop.check.diagnosis.autograd import Forward
from nn_backprop.check.diagnosis.decompositions import TABLE, InstanceNorm
from nn_backprop.check.diagnosis.recorded import Graph, Node, Ref, aten

MAX_NODES = 1500  # a longer computation is not recorded

_TORCH = os.path.dirname(torch.__file__)
_CHECKER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_SAME = (aten.expand.default, aten.view.default)  # nothing, if the shape stays


class NotRecorded(Exception):
    """A computation is too long, or of operations that cannot be written down."""


def _site() -> tuple[tuple, str]:
    """The chain of calls down to the operation, and the innermost line that the user wrote."""
    frame: FrameType | None = sys._getframe(2)
    chain: list[tuple] = []
    line = None
    while frame is not None and frame.f_code is not record.__code__:
        file = frame.f_code.co_filename
        if frame.f_code is not _Recorder.__torch_dispatch__.__code__:
            chain.append((file, frame.f_code.co_firstlineno, frame.f_lasti))
            if line is None and not file.startswith((_TORCH, _CHECKER, "<")):
                line = linecache.getline(file, frame.f_lineno).strip()
        frame = frame.f_back
    return tuple(chain), line or ""


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.storage_offset()


def _write(old: Tensor, new: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """What `old` becomes when entries of `new` are written into it."""
    return old.flatten().index_copy(0, to, new.flatten()[of]).view(old.shape)


class _Recorder(TorchDispatchMode):
    """Writes down every ATen operation; broadcasting becomes an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []
        self.values: list[Tensor] = []
        self.index: dict[int, int] = {}
        self.nodes: list[Node] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its whole compiler

    def ref(self, t: Tensor) -> int:
        if id(t) not in self.index:
            self.index[id(t)] = len(self.values)
            self.values.append(t)
            self.alive.append(t)  # so that its id stays its own
        return self.index[id(t)]

    def write(self, func: Any, args: Any, kwargs: Any, out: Any, at: tuple[tuple, str]) -> None:
        if func is aten.detach.default:  # a place where the chain may have been cut
            func = aten.alias.default
        flat, spec = tree_flatten((args, kwargs))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not made or made[0] is flat[0] or any(id(t) in self.index for t in made):
            return
        if func in _SAME and made[0].shape == args[0].shape:
            self.index[id(made[0])] = self.ref(args[0])
            self.alive.append(made[0])
            return
        flat = [Ref(self.ref(a)) if isinstance(a, Tensor) else a for a in flat]
        self.nodes.append(Node(func, flat, spec, [self.ref(t) for t in made], *at))
        if len(self.nodes) > MAX_NODES:
            raise NotRecorded("too long a computation")

    def mutate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation in place becomes one that makes a new value, also of every tensor that
        shares the memory: the name stays, the value behind it is another one."""
        names = [a.name for a in func._schema.arguments if a.is_out]
        name = func.overloadpacket.__name__
        if len(names) > 1 or not (names or name.endswith("_")):
            raise NotRecorded(f"{name} writes into tensors in a way of its own")
        target = kwargs[names[0]] if names else args[0]
        storage = target.untyped_storage()

        def shares(t: Tensor) -> bool:
            return t.untyped_storage().data_ptr() == storage.data_ptr()

        sharing = [t for t in self.alive if t is not target and shares(t)]
        self.values = [t.clone() if shares(t) else t for t in self.values]
        olds = [self.values[self.index[id(t)]] for t in sharing]
        packet: Any = getattr(aten, name.removesuffix("_"), None)
        if names:
            with self:
                out = packet(*args, **{k: v for k, v in kwargs.items() if k != names[0]})
            target.resize_(out.shape).copy_(out)
        elif packet is None or func._overloadname not in packet.overloads():  # say, bernoulli_
            func(*args, **kwargs)
            out = target.clone()
        else:
            with self:
                out = getattr(packet, func._overloadname)(*args, **kwargs)
            out = out if out.dtype == target.dtype else out.to(target.dtype)
            target.copy_(out)
        self.index[id(target)] = self.ref(out)
        self.alive.append(target)
        where = torch.arange(storage.nbytes() // target.itemsize)
        written = torch.as_strided(where, *_layout(target)).flatten()
        for t, old in zip(sharing, olds, strict=True):
            held = torch.full_like(where, -1)
            torch.as_strided(held, *_layout(t)).copy_(torch.arange(t.numel()).view(t.shape))
            to = held[written]
            of = (to >= 0).nonzero().flatten()
            if t.dtype == target.dtype and len(of):
                new = _write(old, out, to[of], of)
                self.write(_write, (old, out, to[of], of), {}, new, _site())
                self.index[id(t)] = self.ref(new)
        return target

    def alias(self, t: Tensor) -> Tensor:
        """A node that does nothing, at a leaf or an output: a place for mistakes."""
        self.write(aten.alias.default, (t,), {}, out := t.detach().view_as(t), ((id(t),), ""))
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (rule := TABLE.get(func)) is not None:
            with self:
                out = rule(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        if func._schema.is_mutable:
            return self.mutate(func, args, kwargs)
        if torch.Tag.pointwise in func.tags:
            shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))

            def needs(a: Any) -> bool:
                return isinstance(a, Tensor) and a.shape != shape

            with self:
                args = tuple(a.expand(shape) if needs(a) else a for a in args)
        out = func(*args, **kwargs)
        if "empty" in func.overloadpacket.__name__:
            out.zero_()  # what happens to be in memory would differ from run to run
        self.write(func, args, kwargs, out, _site())
        return out


def record(forward: Forward, inputs: dict[str, Tensor]) -> Graph:
    """The graph of one call. Raises NotRecorded, and whatever the forward raises."""
    recorder = _Recorder()
    leaves = {name: t.detach().clone() for name, t in inputs.items()}
    aliases = {name: recorder.alias(t) for name, t in leaves.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    modes = len(_get_current_dispatch_mode_stack())
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), InstanceNorm(), recorder:
            outputs = list(forward(aliases))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        while len(_get_current_dispatch_mode_stack()) > modes:  # an exit too deep in recursion
            _pop_mode()
    if any(id(t) not in recorder.index for t in outputs):
        raise NotRecorded("an output that nothing made")
    ends = [recorder.index[id(recorder.alias(t))] for t in outputs]
    names = {recorder.index[id(t)]: name for name, t in leaves.items()}
    needed = set(ends)
    nodes: list[Node] = []
    for node in reversed(recorder.nodes):  # what no output depends on is left out
        if needed.intersection(node.outs):
            nodes.append(node)
            needed.update(v for _, v in node.operands())
    return Graph(recorder.values, nodes[::-1], names, ends)
