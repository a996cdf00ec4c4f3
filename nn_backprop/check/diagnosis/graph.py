"""A forward, recorded as a graph of primitive operations, and the chain rule played over it.

Reverse mode goes from the outputs' z̄ = upstream back to the leaves,

    x̄ₖ = Σ over the uses f of xₖ of  (∂f/∂xₖ)ᵀ z̄,

where a step may be given another rule than the right one (see `mistakes.py`). Forward mode gives
the tangents t = J r, J = ∂value/∂leaf, of every value at once. What torch does in one kernel (a
norm, a softmax, a loss) is taken apart, and broadcasting is an operation of its own, so that the
steps that a hand-written backward is about become visible.
"""

import inspect
import linecache
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
)
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Forward = Callable[[dict[str, Tensor]], list[Tensor]]
aten = torch.ops.aten
MAX_NODES = 1500  # a longer computation is not recorded

# ---------------------------------------------------------------------------------------------
# Recording


class Ref(NamedTuple):
    value: int  # the place in `Graph.values` of a tensor argument


def _op(func: Any) -> str:
    return getattr(func, "overloadpacket", func).__name__


@dataclass(eq=False)
class Node:
    """One recorded operation."""

    func: Any
    flat: list[Any]  # its arguments, with tensors as Ref
    spec: Any
    outs: list[int]
    site: tuple  # the chain of calls that led here: equal for the repetitions in a loop
    line: str  # of the user's code

    @property
    def op(self) -> str:
        return _op(self.func).strip("_")

    def operands(self) -> Iterator[tuple[int, int]]:
        """Position among the arguments, and value."""
        return ((k, a.value) for k, a in enumerate(self.flat) if isinstance(a, Ref))


def _mean_and_var(x: Tensor, dims: Any, correction: float, keep: bool) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if not dims else list(dims)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    n = math.prod(x.shape[d] for d in dims)
    var = (centred * centred).mean(dims, keepdim=True)
    if correction:
        var = var * (n / max(n - correction, 0))
    if not keep:
        mean, var = mean.squeeze(dims), var.squeeze(dims)
    return mean, var


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _mean_and_var(x, dim, 1 if correction is None else correction, keepdim)[1]


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _mean_and_var(x, dim, 1 if correction is None else correction, keepdim)[::-1]


def _std(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def _normalise(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = _mean_and_var(x, dims, 0, True)
    inverse = torch.rsqrt(var + eps)
    return (x - mean) * inverse, mean, inverse


def _batch_norm(x: Tensor, w: Any, b: Any, mean: Any, var: Any, train: bool, _: Any, eps: Any):
    shape = [1, -1] + [1] * (x.dim() - 2)
    if train:
        y, mean, inverse = _normalise(x, [d for d in range(x.dim()) if d != 1], eps)
    else:
        inverse = torch.rsqrt(var + eps)
        y = (x - mean.view(shape)) * inverse.view(shape)
    y = y if w is None else y * w.view(shape)
    y = y if b is None else y + b.view(shape)
    return y, mean.flatten(), inverse.flatten()


def _layer_norm(x: Tensor, shape: Any, w: Any, b: Any, eps: float) -> Any:
    y, mean, inverse = _normalise(x, list(range(x.dim() - len(shape), x.dim())), eps)
    y = y if w is None else y * w
    return y if b is None else y + b, mean, inverse


def _group_norm(x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    y, mean, inverse = _normalise(x.reshape(n, groups, -1), [2], eps)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y.view(x.shape)
    y = y if w is None else y * w.view(shape)
    y = y if b is None else y + b.view(shape)
    return y, mean.flatten(1), inverse.flatten(1)


class _InstanceNorm(TorchFunctionMode):
    """Inside, instance norm is taken apart: torch folds the batch into the channels for it, where
    nobody would find the axis again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.instance_norm:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        x, mean, _, w, b, _, _, eps = given.args
        if mean is not None:
            return func(*args, **(kwargs or {}))
        y, *_ = _normalise(x, list(range(2, x.dim())), eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = y if w is None else y * w.view(shape)
        return y if b is None else y + b.view(shape)


def _log_softmax(x: Tensor, dim: int, _: bool = False) -> Tensor:
    return x - torch.logsumexp(x, dim, keepdim=True)


def _softmax(x: Tensor, dim: int, _: Any = None, dtype: Any = None) -> Tensor:
    return _log_softmax(x if dtype is None else x.to(dtype), dim).exp()


def _bce_with_logits(
    x: Tensor, t: Tensor, w: Any = None, positive: Any = None, reduction: int = 1
) -> Any:
    if positive is not None:
        return NotImplemented
    loss = torch.nn.functional.softplus(x) - t * x
    loss = loss if w is None else loss * w
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _convolution(x: Tensor, w: Tensor, b: Any, *rest: Any) -> Any:
    if b is None:
        return NotImplemented
    return torch.convolution(x, w, None, *rest) + b.view([-1] + [1] * (x.dim() - 2))


def _addmm(b: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = x @ y
    product = product if alpha == 1 else product * alpha
    return product + (b if beta == 1 else b * beta)


def _table() -> dict[Any, Callable]:
    """What is taken apart, so that the steps a hand-written backward is about become visible."""
    names = (
        "nll_loss_forward nll_loss2d_forward mse_loss binary_cross_entropy smooth_l1_loss "
        "huber_loss _prelu_kernel addcmul "
        "addcdiv lerp native_dropout log_sigmoid_forward linalg_vector_norm masked_fill rsub glu "
        "elu hardswish hardsigmoid mish _unsafe_view"
    )
    table: dict[Any, Callable] = {}
    for func, rule in torch._decomp.decomposition_table.items():
        if isinstance(func, torch._ops.OpOverload) and _op(func) in names.split():
            table[func] = rule
    ours: dict[Callable, list[Any]] = {
        _var: [aten.var.correction],
        _var_mean: [aten.var_mean.correction],
        _std: [aten.std.correction],
        _batch_norm: [aten.native_batch_norm.default, aten._native_batch_norm_legit.default],
        _layer_norm: [aten.native_layer_norm.default],
        _group_norm: [aten.native_group_norm.default],
        _log_softmax: [aten._log_softmax.default],
        _bce_with_logits: [aten.binary_cross_entropy_with_logits.default],
        _gelu: [aten.gelu.default],
        lambda x: x * torch.sigmoid(x): [aten.silu.default],
        lambda x, slope=0.01: torch.where(x > 0, x, x * slope): [aten.leaky_relu.default],
        _convolution: [aten.convolution.default],
        _addmm: [aten.addmm.default, aten.baddbmm.default],
        lambda to, x, _=False: x.expand(to.shape).to(to.dtype): [aten.copy.default],
        _softmax: [aten._softmax.default, aten._safe_softmax.default],
        lambda x, w, b, train, momentum, eps: _batch_norm(
            x, w, b, None, None, train, momentum, eps
        ): [aten._native_batch_norm_legit.no_stats],
    }
    return table | {func: rule for rule, funcs in ours.items() for func in funcs}


_TABLE = _table()
_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.abspath(__file__))


def _site() -> tuple[tuple, str]:
    """The chain of calls down to the operation, and the innermost line that the user wrote."""
    frame: FrameType | None = sys._getframe(2)
    chain: list[tuple] = []
    line = None
    while frame is not None and frame.f_code is not record.__code__:
        file = frame.f_code.co_filename
        if frame.f_code is not _Recorder.__torch_dispatch__.__code__:
            chain.append((file, frame.f_code.co_firstlineno, frame.f_lasti))
            if line is None and not file.startswith((_TORCH, _HERE, "<")):
                line = linecache.getline(file, frame.f_lineno).strip()
        frame = frame.f_back
    return tuple(chain), line or ""


_SAME = (aten.expand.default, aten.view.default)  # nothing, if the shape stays


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
            raise RuntimeError("too long a computation")

    def mutate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation in place becomes one that makes a new value, also of every tensor that
        shares the memory: the name stays, the value behind it is another one."""
        names = [a.name for a in func._schema.arguments if a.is_out]
        name = func.overloadpacket.__name__
        if len(names) > 1 or not (names or name.endswith("_")):
            raise RuntimeError(f"{name} writes into tensors in a way of its own")
        target = kwargs[names[0]] if names else args[0]
        storage = target.untyped_storage()
        sharing = [
            t
            for t in self.alive
            if t is not target and t.untyped_storage().data_ptr() == storage.data_ptr()
        ]
        for i, t in enumerate(self.values):
            if t.untyped_storage().data_ptr() == storage.data_ptr():
                self.values[i] = t.clone()
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
        if (rule := _TABLE.get(func)) is not None:
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
            shapes = [a.shape for a in args if isinstance(a, Tensor)]
            shape = torch.broadcast_shapes(*shapes)
            with self:
                args = tuple(
                    a.expand(shape) if isinstance(a, Tensor) and a.shape != shape else a
                    for a in args
                )
        out = func(*args, **kwargs)
        self.write(func, args, kwargs, out, _site())
        return out


def record(forward: Forward, inputs: dict[str, Tensor]) -> "Graph":
    recorder = _Recorder()
    leaves = {name: t.detach().clone() for name, t in inputs.items()}
    aliases = {name: recorder.alias(t) for name, t in leaves.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    modes = len(_get_current_dispatch_mode_stack())
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _InstanceNorm(), recorder:
            outputs = list(forward(aliases))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        while len(_get_current_dispatch_mode_stack()) > modes:  # an exit too deep in recursion
            _pop_mode()
    if any(id(t) not in recorder.index for t in outputs):
        raise RuntimeError("an output that nothing made")
    ends = [recorder.index[id(recorder.alias(t))] for t in outputs]
    names = {recorder.index[id(t)]: name for name, t in leaves.items()}
    needed = set(ends)
    nodes: list[Node] = []
    for node in reversed(recorder.nodes):  # what no output depends on is left out
        if needed.intersection(node.outs):
            nodes.append(node)
            needed.update(v for _, v in node.operands())
    return Graph(recorder.values, nodes[::-1], names, ends)


# ---------------------------------------------------------------------------------------------
# The graph, and reverse mode over it

Upstream = list[Any]  # a tensor or None for each output of a node
Edges = dict[int, Tensor]  # what a node sends to its operands, by position
Sweep = dict[int, Upstream]  # the upstream of every node
Rule = Callable[[Upstream, Sweep], Edges]  # a node's wrong local derivative


class Graph:
    def __init__(
        self, values: list[Tensor], nodes: list[Node], leaves: dict[int, str], ends: list[int]
    ) -> None:
        self.values, self.nodes, self.leaves, self.ends = values, nodes, leaves, ends
        self.maker = {v: i for i, node in enumerate(nodes) for v in node.outs}
        self.active = set(leaves)  # the values that depend on a leaf
        for node in nodes:
            if any(v in self.active for _, v in node.operands()):
                self.active.update(v for v in node.outs if values[v].is_floating_point())
        self.order = [i for i, node in enumerate(nodes) if self.active.intersection(node.outs)]
        self.before: dict[int, int] = defaultdict(int)  # the nodes a value depends on, as bits
        for i in self.order:
            mask = 1 << i
            for _, v in nodes[i].operands():
                mask |= self.before[v]
            for v in nodes[i].outs:
                self.before[v] = mask
        self.cache: dict[int, tuple[dict[int, Tensor], list[Tensor]]] = {}
        self.uses: dict[int, list[int]] = defaultdict(list)
        for i in self.order:
            for _, v in nodes[i].operands():
                self.uses[v].append(i)

    def call(self, i: int, swap: dict[int, Any]) -> list[Tensor]:
        """Run a node again, with other arguments at some positions."""
        node = self.nodes[i]
        flat = [self.values[a.value] if isinstance(a, Ref) else a for a in node.flat]
        for k, a in swap.items():
            flat[k] = a
        args, kwargs = tree_unflatten(flat, node.spec)
        return [t for t in tree_leaves(node.func(*args, **kwargs)) if isinstance(t, Tensor)]

    def replay(self, i: int, swap: dict[int, Any]) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Run a node again under autograd."""
        inputs = {
            k: (swap[k] if k in swap else self.values[v]).detach().requires_grad_()
            for k, v in self.nodes[i].operands()
            if v in self.active
        }
        with torch.enable_grad():
            return inputs, self.call(i, swap | inputs)

    def vjp(self, i: int, us: Upstream, swap: dict[int, Any] | None = None) -> Edges:
        """(∂f/∂x)ᵀ ū for each operand x of node i, maybe with some operands replaced."""
        node = self.nodes[i]
        plain = node.func in (aten.alias.default, aten.add.Tensor) and len(node.flat) < 3
        if plain and us[0] is not None:  # without alpha: what comes in goes out
            return {k: us[0] for k, v in node.operands() if v in self.active}
        if swap:
            inputs, outs = self.replay(i, swap)
        else:
            if i not in self.cache:
                self.cache[i] = self.replay(i, {})
            inputs, outs = self.cache[i]
        pairs = [(o, u) for o, u in zip(outs, us, strict=True) if u is not None and o.requires_grad]
        if not pairs or not inputs:
            return {}
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            list(inputs.values()),
            [u for _, u in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return {k: g for k, g in zip(inputs, grads, strict=True) if g is not None}

    def sweep(
        self,
        seeds: dict[int, Tensor],
        rules: dict[int, Rule] | None = None,
        merges: dict[int, Callable[[list[Tensor]], Tensor]] | None = None,
    ) -> tuple[dict[int, list[Tensor]], Sweep, dict[int, Edges]]:
        """Reverse mode: the contributions to each value, each node's upstream, and its answer."""
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for v, seed in seeds.items():
            parts[v].append(seed)
        upstream: Sweep = {}
        edges: dict[int, Edges] = {}
        for i in reversed(self.order):
            node = self.nodes[i]
            if not any(v in parts for v in node.outs):
                continue
            us = [self.total(parts, v, merges) for v in node.outs]
            upstream[i] = us
            rule = rules.get(i) if rules else None
            edges[i] = self.vjp(i, us) if rule is None else self.vjp(i, us) | rule(us, upstream)
            for k, g in edges[i].items():
                parts[node.flat[k].value].append(g)
        return parts, upstream, edges

    @staticmethod
    def total(parts: dict[int, list[Tensor]], v: int, merges: Any = None) -> Tensor | None:
        if v not in parts:
            return None
        if merges and v in merges:
            return merges[v](parts[v])
        return parts[v][0] if len(parts[v]) == 1 else torch.stack(parts[v]).sum(0)

    def tangents(self, leaf: int, directions: list[Tensor]) -> dict[int, Tensor]:
        """J r of every value that depends on the leaf, for each direction r.

        A reverse step ū ↦ Jᵀū is linear in ū; the derivative of ⟨Jᵀū, t⟩ by ū is J t."""
        found = {leaf: torch.stack([r.flatten() for r in directions])}
        for i in self.order:
            operands = dict(self.nodes[i].operands())
            inputs, outs = self.replay(i, {})
            made = [(v, o) for v, o in zip(self.nodes[i].outs, outs, strict=True)]
            made = [(v, o) for v, o in made if v in self.active and o.requires_grad]
            moved = {k: x for k, x in inputs.items() if operands[k] in found}
            if not made or not moved:
                continue
            us = [torch.zeros_like(o, requires_grad=True) for _, o in made]
            grads = torch.autograd.grad(
                [o for _, o in made], list(moved.values()), us, create_graph=True, allow_unused=True
            )
            pairs = [(k, g) for k, g in zip(moved, grads, strict=True) if g is not None]
            pairs = [(k, g) for k, g in pairs if g.requires_grad]
            if not pairs:
                continue
            columns = []
            for p in range(len(directions)):
                ts = [found[operands[k]][p].view(g.shape) for k, g in pairs]
                columns.append(
                    torch.autograd.grad(
                        [g for _, g in pairs],
                        us,
                        ts,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
            for (v, _), column in zip(made, zip(*columns, strict=True), strict=True):
                found[v] = torch.stack([t.flatten() for t in column])
        return found


# What sorts of operations there are, by name, and small tools

SILENT = {"alias", "view", "expand", "unsqueeze", "squeeze", "clone", "write", "to_copy"}
TURNS = {"t": "transposed", "transpose": "transposed", "permute": "transposed", "roll": "shifted"}
ORDERS = dict.fromkeys(("flip", "index", "gather", "index_select"), "permuted")
MOVES = SILENT | {*TURNS, *ORDERS, "select", "slice", "split", "split_with_sizes", "unsafe_split"}
MOVES |= {"unbind", "cat", "stack", "embedding", "im2col", "unfold", "repeat", "diagonal"}
MOVES |= {f"{how}_pad{d}d" for how in ("replication", "reflection") for d in (1, 2, 3)}
REDUCTIONS = {"sum", "mean", "logsumexp", "amax", "amin", "prod"}
PRODUCTS = {"mm", "bmm", "convolution", "embedding"}


def add_to(total: dict[int, Tensor], deltas: dict[int, Tensor]) -> None:
    for v, d in deltas.items():
        total[v] = total[v] + d if v in total else d


def only_range(t: Tensor, dim: int, start: int, end: int) -> Tensor:
    """Zero but for a range of an axis."""
    kept = torch.zeros_like(t)
    kept.narrow(dim, start, end - start).copy_(t.narrow(dim, start, end - start))
    return kept


def offsets(t: Tensor) -> Iterator[tuple[tuple, str, Callable[[Tensor], Tensor]]]:
    """Off by one along an axis: going round, or with a zero coming in."""
    for d, n in enumerate(t.shape):
        for by in (1, -1) if n > 2 else ():
            start, end = (1, n) if by > 0 else (0, n - 1)
            text = f"off by one along axis {d}"
            yield ("roll", d, by), text, lambda t, d=d, by=by: t.roll(by, d)  # type: ignore[misc]
            yield (
                ("shift", d, by),
                text,
                lambda t, d=d, by=by, a=start, b=end: only_range(t.roll(by, d), d, a, b),  # type: ignore[misc]
            )
