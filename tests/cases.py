"""The one table of test cases: (torch callable, arguments), for every row of `rules.TABLE`.

Sizes are distinct primes (groups apart), so that no transposition, and no 1/N for 1/C, can hide.
Arrays are drawn when they are asked for, from the case's own seed, in float64.
"""

import functools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nn_backprop import rules
from nn_backprop.rules import Rule
from nn_backprop.rules.locally_connected import locally_connected2d as local
from nn_backprop.rules.rule import name_of
from nn_backprop.rules.winners import k_winners


@dataclass(frozen=True)
class Array:
    """An array argument: how it is drawn, and whether its gradient is wanted."""

    draw: Callable[[Generator], Tensor]
    differentiable: bool = True


def x(*shape: int) -> Array:
    return Array(lambda seeded: torch.randn(shape, dtype=torch.float64, generator=seeded))


def positive(*shape: int) -> Array:
    """Far enough from 0 to divide by."""
    return Array(lambda seeded: 0.5 + torch.rand(shape, dtype=torch.float64, generator=seeded))


def apart(*shape: int) -> Array:
    """No two entries, and no entry and 0, closer than 0.02: no finite step crosses a kink."""
    n = torch.Size(shape).numel()
    return Array(lambda seeded: (torch.randperm(n, generator=seeded) - n / 2 + 0.25).reshape(shape)
                 .to(torch.float64) * 0.04)  # fmt: skip


def once_or_twice(*shape: int) -> Array:
    """1 or 2: times these, entries of `apart` are still 0.01 apart, and exact in any type."""
    return Array(lambda seeded: 1 + torch.randint(2, shape, generator=seeded).double())


def labels(*shape: int, classes: int, ignored: int | None = None) -> Array:
    """Class numbers; the second of them is `ignored` if that is given."""

    def draw(seeded: Generator) -> Tensor:
        y = torch.randint(classes, shape, generator=seeded)
        if ignored is not None:
            y.view(-1)[1] = ignored
        return y

    return Array(draw, differentiable=False)


def shares(*shape: int) -> Array:
    """Class probabilities: positive, of sum 1 along axis 1."""
    return Array(lambda seeded: torch.softmax(x(*shape).draw(seeded), 1))


def constant(array: Array) -> Array:
    """The same, but nobody wants its gradient."""
    return Array(array.draw, differentiable=False)


@dataclass(frozen=True, eq=False)
class Case:
    """One call of a torch callable that is a key of `rules.TABLE`.

    `staircase` says that the forward rounds, so that no finite difference is its derivative;
    `alias`, that another case hands the same arguments to the same rule, so that only the way to
    the rule is new.
    """

    function: Callable
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    staircase: bool = False
    alias: bool = False

    @property
    def rule(self) -> Rule:
        return rules.TABLE[self.function]

    @property
    def id(self) -> str:
        name = name_of(self.function).removeprefix("torch.nn.")
        return " ".join(filter(None, [name.removeprefix("nn_backprop.rules."), self.note]))

    @property
    def seed(self) -> int:
        return zlib.crc32(self.id.encode())

    def draw(
        self,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        rounded: torch.dtype = torch.float64,
    ) -> tuple[tuple, dict[str, Any]]:
        """New arguments, the same at every call. Their values are those of the type `rounded`."""
        seeded = Generator().manual_seed(self.seed)

        def make(arg: Any) -> Any:
            if not isinstance(arg, Array):
                return arg
            tensor = arg.draw(seeded)
            if tensor.is_floating_point():
                tensor = tensor.to(rounded).to(dtype)
            return tensor.to(device).requires_grad_(arg.differentiable)

        return tuple(map(make, self.args)), {name: make(a) for name, a in self.kwargs.items()}

    @functools.cached_property
    def names(self) -> list[str]:
        """The operands, as the rule calls them, whose gradient is wanted."""
        (args, kwargs), places = self.draw(), self.rule.tensors
        arguments, _ = self.rule.arguments(args, kwargs)
        return [
            name
            for name, i in places.items()
            if i < len(arguments)
            and isinstance(arguments[i], Tensor)
            and arguments[i].requires_grad
        ]


def each(functions: Iterable[Callable], *args, note: str = "", **kwargs) -> list[Case]:
    """The same arguments for several callables. All but a rule's first are aliases."""
    cases: list[Case] = []
    for f in functions:
        seen = {case.rule.name for case in cases}
        cases.append(Case(f, args, kwargs, note, alias=rules.TABLE[f].name in seen))
    return cases


T = Tensor
OLD = torch.__version__.startswith("2.6.")  # refuses a vector as the weight of leading axes

CASES: list[Case] = [
    # linear
    Case(F.linear, (x(3, 5), x(7, 5), x(7))),
    Case(F.linear, (x(3, 5), x(7, 5)), note="no bias"),
    Case(F.linear, (x(2, 3, 5), x(7, 5), x(7)), note="leading axes"),
    Case(F.linear, (x(5), x(7, 5), x(7)), note="vector"),
    Case(F.linear, (x(3, 5), x(5)), note="one output"),
    *([] if OLD else
      [Case(F.linear, (x(2, 3, 5), x(5), x()), note="one output, leading axes, bias")]),
    Case(F.linear, (x(5), x(5), x()), note="one output, vector"),
    Case(F.linear, (), {"input": x(3, 5), "weight": x(7, 5), "bias": x(7)}, "keywords"),
    # matmul
    *each([torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm], x(3, 5), x(5, 7)),
    *each([torch.matmul, T.matmul], x(3, 5), note="keywords", other=x(5, 7)),
    *each([torch.mm, T.mm], x(3, 5), note="keywords", mat2=x(5, 7)),
    *each([torch.bmm, T.bmm], x(2, 3, 5), x(2, 5, 7)),
    *each([torch.bmm], x(2, 3, 5), note="keywords", mat2=x(2, 5, 7)),
    Case(torch.matmul, (x(5), x(5)), note="vector vector"),
    Case(torch.matmul, (x(3, 5), x(5)), note="matrix vector"),
    Case(torch.matmul, (x(5), x(5, 7)), note="vector matrix"),
    Case(torch.matmul, (x(5), x(2, 5, 7)), note="vector batch"),
    Case(torch.matmul, (x(2, 3, 5), x(5)), note="batch vector"),
    Case(torch.matmul, (x(2, 1, 3, 5), x(11, 5, 7)), note="broadcast"),
    # conv2d: groups stand apart, as factors
    Case(F.conv2d, (x(2, 3, 5, 7), x(11, 3, 2, 3), x(11))),
    Case(F.conv2d, (x(2, 3, 5, 7), x(11, 3, 2, 3)), note="no bias"),
    Case(F.conv2d, (x(3, 5, 7), x(11, 3, 2, 3), x(11)), note="no batch"),
    Case(F.conv2d, (x(2, 3, 7, 11), x(5, 3, 2, 3), x(5), 3), note="stride"),
    Case(F.conv2d, (x(2, 3, 7, 5), x(11, 3, 2, 3), x(11), (2, 3), (1, 2)), note="pairs"),
    Case(F.conv2d, (x(2, 3, 7, 11), x(5, 3, 2, 3), x(5), (2,), (1,), (3,)), note="one-tuples"),
    Case(F.conv2d, (x(2, 3, 7, 11), x(5, 3, 2, 3), x(5), 1, 2, (3, 2)), note="dilation"),
    Case(F.conv2d, (x(2, 3, 5, 7), x(11, 3, 2, 3), x(11), 1, "same"), note="same"),
    Case(F.conv2d, (x(2, 3, 5, 7), x(7, 3, 2, 2), None, 1, "same", (1, 3)), note="same, dilated"),
    Case(F.conv2d, (x(2, 3, 5, 7), x(11, 3, 2, 3), x(11), 2, "valid"), note="valid"),
    Case(F.conv2d, (x(2, 2 * 3, 5, 7), x(2 * 5, 3, 2, 3), x(10), 1, 1, 1, 2), note="groups"),
    Case(F.conv2d, (x(2, 3, 5, 7), x(3 * 2, 1, 2, 3), x(6), 1, 0, 1, 3), note="depthwise"),
    Case(F.conv2d, (x(2, 3, 5, 7),), {"weight": x(11, 3, 2, 3), "padding": 1}, "keywords"),
    # locally_connected2d
    Case(local, (x(3, 2, 3, 5), x(2, 3, 5, 2, 2, 3), x(5, 2, 3))),
    Case(local, (x(3, 2, 3, 5), x(2, 3, 5, 2, 2, 3)), note="no bias"),
    Case(local, (x(3, 3, 5), x(2, 3, 2, 3, 2, 3), x(2, 2, 3)), note="no batch"),
    Case(local, (x(5, 3, 7, 5), x(3, 2, 2, 3, 3, 2), x(2, 3, 2), (3, 4), (1, 1)), note="pairs"),
    Case(local, (x(2, 3, 5, 7), x(2, 3, 5, 3, 2, 2), None, 3, 1), note="overreaching border"),
    Case(local, (x(3, 2, 5, 3), x(5, 3, 2, 2, 2, 3), None, 1, "same"), note="same"),
    Case(local, (x(3, 2, 2, 5),), {"weight": x(3, 5, 2, 2, 2, 3), "padding": 1}, "keywords"),
    # pooling
    *each([F.max_pool2d, torch.max_pool2d], apart(2, 3, 5, 7), 2),
    Case(F.max_pool2d, (apart(3, 5, 7), 2), note="no batch"),
    Case(F.max_pool2d, (apart(2, 3, 5, 7), 3, 1, 1), note="overlapping, border"),
    Case(F.max_pool2d, (apart(2, 3, 7, 11), (2, 3), (3, 2), (1, 0), (2, 3)), note="pairs"),
    Case(F.max_pool2d, (apart(2, 3, 5, 7), 3, 2, 1, 1, True), note="ceil"),
    *each([F.max_pool2d, torch.max_pool2d], note="keywords",
          input=apart(2, 3, 5, 7), kernel_size=[2], stride=[], ceil_mode=True),
    Case(F.avg_pool2d, (x(2, 3, 5, 7), 2)),
    Case(F.avg_pool2d, (x(3, 5, 7), 2), note="no batch"),
    Case(F.avg_pool2d, (x(2, 3, 5, 7), 3, 1, 1), note="overlapping, border"),
    Case(F.avg_pool2d, (x(2, 3, 5, 7), 3, 2, 1, False, False), note="border not counted"),
    Case(F.avg_pool2d, (x(2, 3, 7, 11), (2, 3), (3, 2), (1, 0), True), note="pairs, ceil"),
    Case(F.avg_pool2d, (x(2, 3, 5, 7), 2, 3, 1, True, True), note="ceil, border"),
    Case(F.avg_pool2d, (x(2, 3, 5, 7), 2, 3, 1, True, False), note="ceil, border not counted"),
    Case(F.avg_pool2d, (x(2, 3, 5, 7), 3, 2, 1, True, True, 7), note="divisor"),
    Case(F.avg_pool2d, (), {"input": x(2, 3, 5, 7), "kernel_size": (2,), "stride": ()}, "keywords"),
    # interpolate
    *[Case(F.interpolate, (x(2, 3, 5, 7), size), {"mode": mode}, f"{mode}, {size}")
      for mode in ("nearest", "nearest-exact") for size in ((11, 13), (3, 2), 11)],
    Case(F.interpolate, (x(2, 3, 5, 7), None, 2.0), note="doubled"),
    Case(F.interpolate, (x(2, 3, 5, 7), None, (2.5, 0.7)), note="pair"),
    Case(F.interpolate, (x(2, 3, 5, 7), None, (2.5, 0.7), "nearest", None, True),
         note="recomputed"),
    Case(F.interpolate, (), {"input": x(2, 3, 5, 7), "scale_factor": 3}, "keywords"),
    # activations
    *each([F.relu, torch.relu, T.relu, torch.relu_, T.relu_], apart(3, 5)),
    *each([F.relu], note="keywords", input=apart(3, 5), inplace=True),
    *each([torch.relu], note="keywords", input=apart(3, 5)),
    *each([F.leaky_relu, F.leaky_relu_], apart(3, 5)),
    *each([F.leaky_relu, F.leaky_relu_], apart(3, 5), 0.2, note="slope"),
    *each([F.leaky_relu, F.leaky_relu_], apart(3, 5), note="keywords", negative_slope=0.2),
    *each([F.leaky_relu], apart(3, 5), -0.2, note="negative slope"),
    *each([F.sigmoid, torch.sigmoid, T.sigmoid, torch.sigmoid_, T.sigmoid_], x(3, 5)),
    *each([F.tanh, torch.tanh, T.tanh, torch.tanh_, T.tanh_], x(3, 5)),
    *each([torch.sigmoid, torch.tanh], note="keywords", input=x(3, 5)),
    Case(F.gelu, (x(3, 5),)),
    Case(F.gelu, (x(3, 5),), {"approximate": "tanh"}, "tanh"),
    *each([torch.cos, T.cos], x(3, 5)),
    *each([torch.cos], note="keywords", input=x(3, 5)),
    # k_winners
    Case(k_winners, (apart(3, 7), 2)),
    Case(k_winners, (apart(3, 7), 5, constant(once_or_twice(7))), note="boost"),
    Case(k_winners, (apart(2, 3, 5, 7), 11), note="maps"),
    Case(k_winners, (apart(2, 3, 5, 7), 53, constant(once_or_twice(3, 1, 1))), note="maps, boost"),
    Case(k_winners, (x(3, 5), 5, constant(positive(5))), note="all win"),
    Case(k_winners, (), {"input": apart(3, 7), "k": 2, "boost": None}, "keywords"),
    Case(F.softmax, (x(3, 5), 1)),
    *each([torch.softmax, T.softmax, torch.log_softmax, T.log_softmax], x(3, 5), 1),
    *each([torch.softmax, T.softmax, torch.log_softmax, T.log_softmax, F.softmax, F.log_softmax],
          x(2, 3, 5), note="keywords", dim=-2),
    *each([torch.softmax, T.softmax, torch.log_softmax, T.log_softmax], x(2, 3, 5), 0,
          torch.float64, note="type"),
    Case(F.log_softmax, (x(3, 5), 1)),
    # cross_entropy
    Case(F.cross_entropy, (x(3, 5), labels(3, classes=5))),
    Case(F.cross_entropy, (x(5), labels(classes=5)), note="no batch"),
    Case(F.cross_entropy, (x(3, 5, 2, 7), labels(3, 2, 7, classes=5)), note="pixels"),
    *[Case(F.cross_entropy, (x(3, 5), labels(3, classes=5)), {"reduction": r}, r)
      for r in ("none", "sum")],
    *[Case(F.cross_entropy, (x(3, 5, 2), labels(3, 2, classes=5, ignored=4),
                             constant(positive(5))),
           {"ignore_index": 4, "reduction": r, "label_smoothing": 0.3}, f"weights, ignored, {r}")
      for r in ("mean", "none", "sum")],
    Case(F.cross_entropy, (x(3, 5), labels(3, classes=5, ignored=-100)), note="ignored"),
    *[Case(F.cross_entropy, (x(3, 5, 2), shares(3, 5, 2), positive(5)),
           {"reduction": r, "label_smoothing": 0.3}, f"shares, weights, {r}")
      for r in ("mean", "none", "sum")],
    Case(F.cross_entropy, (x(3, 5), shares(3, 5)), note="shares"),
    Case(F.cross_entropy, (), {"input": x(3, 5), "target": labels(3, classes=5)}, "keywords"),
    # nll_loss
    Case(F.nll_loss, (x(3, 5), labels(3, classes=5))),
    Case(F.nll_loss, (x(5), labels(classes=5)), note="no batch"),
    *[Case(F.nll_loss, (x(3, 5, 2, 7), labels(3, 2, 7, classes=5, ignored=4),
                        constant(positive(5))),
           {"ignore_index": 4, "reduction": r}, f"weights, ignored, {r}")
      for r in ("mean", "none", "sum")],
    Case(F.nll_loss, (), {"input": x(3, 5), "target": labels(3, classes=5)}, "keywords"),
    # mse_loss
    Case(F.mse_loss, (x(3, 5), x(3, 5))),
    *[Case(F.mse_loss, (x(3, 5), x(3, 5)), {"reduction": r}, r) for r in ("none", "sum")],
    *[Case(F.mse_loss, (x(3, 5), x(3, 5)), {"weight": positive(3, 5), "reduction": r},
           f"weights, {r}") for r in ("mean", "none", "sum")],
    Case(F.mse_loss, (), {"input": x(3, 5), "target": constant(x(3, 5))}, "keywords"),
    # batch_norm
    Case(F.batch_norm, (x(7, 3), None, None, x(3), x(3), True)),
    Case(F.batch_norm, (x(2, 3, 5, 7), constant(x(3)), constant(positive(3)), x(3), x(3), True),
         note="pixels, running"),
    Case(F.batch_norm, (x(7, 3), None, None, None, None, True, 0.1, 0.5), note="plain, eps"),
    Case(F.batch_norm, (x(2, 3, 5), constant(x(3)), constant(positive(3)), x(3), x(3)),
         note="evaluation"),
    Case(F.batch_norm, (x(7, 3), constant(x(3)), constant(positive(3))), note="evaluation, plain"),
    Case(F.batch_norm, (x(7, 3), None, None), {"weight": x(3), "training": True}, "keywords"),
    # layer_norm
    Case(F.layer_norm, (x(3, 5), (5,), x(5), x(5))),
    Case(F.layer_norm, (x(3, 5), [5]), note="plain"),
    Case(F.layer_norm, (x(2, 3, 5, 7), (5, 7), x(5, 7), x(5, 7), 0.5), note="two axes, eps"),
    Case(F.layer_norm, (x(5), (5,), x(5)), note="vector"),
    Case(F.layer_norm, (), {"input": x(3, 5), "normalized_shape": (5,), "bias": x(5)}, "keywords"),
    # dropout: the seed is set before every forward, so that all draw the same mask
    Case(F.dropout, (x(7, 11), 0.3)),
    Case(F.dropout, (x(7, 11), 0.3, False), note="evaluation"),
    Case(F.dropout, (x(7, 11), 0.0), note="nothing dropped"),
    Case(F.dropout, (x(7, 11),), {"p": 0.3, "inplace": True}, "keywords"),
    # arithmetic
    *each([torch.add, T.add, T.__add__, T.__radd__, T.add_, T.__iadd__], x(3, 5), x(3, 5)),
    *each([torch.sub, T.sub, T.__sub__, T.__rsub__, T.sub_, T.__isub__], x(3, 5), x(3, 5)),
    *each([torch.mul, T.mul, T.__mul__, T.__rmul__, T.mul_, T.__imul__], x(3, 5), x(3, 5)),
    *each([torch.div, T.div, T.__truediv__, T.div_, T.__itruediv__],
          positive(3, 5), positive(3, 5)),
    Case(T.__rtruediv__, (positive(3, 5), 2.0)),
    *each([torch.add, torch.sub, torch.mul, torch.div], positive(2, 1, 5), positive(3, 1),
          note="broadcast"),
    *each([T.add_, T.sub_, T.mul_, T.div_], positive(3, 5), positive(5), note="broadcast"),
    *each([torch.add, T.__radd__, torch.sub, torch.mul, T.__rmul__, torch.div, T.add_, T.sub_,
           T.mul_, T.div_], x(3, 5), 2.0, note="number"),
    Case(T.__rsub__, (x(3, 5), 2.0), note="number"),
    *each([torch.add, torch.mul], 2.0, x(3, 5), note="number first"),
    *each([torch.add, T.add, T.add_, torch.sub, T.sub, T.sub_], x(3, 5), note="keywords",
          other=x(3, 5), alpha=3),
    *each([torch.mul, T.mul, T.mul_, torch.div, T.div, T.div_], positive(3, 5), note="keywords",
          other=positive(3, 5)),
    *each([torch.neg, T.neg], x(3, 5)),
    *each([torch.exp, T.exp], x(3, 5)),
    *each([torch.log, T.log], positive(3, 5)),
    *each([torch.neg, torch.exp, torch.log], note="keywords", input=positive(3, 5)),
    *each([torch.pow, T.pow, T.__pow__], x(3, 5), 3),
    *each([torch.pow], positive(3, 5), -0.7, note="fraction"),
    *each([torch.pow], note="keywords", input=x(3, 5), exponent=2),
    # rearranging
    *each([torch.reshape, T.reshape, T.view], x(3, 10), (2, 15)),
    *each([T.reshape, T.view], x(3, 10), 2, -1, note="one by one"),
    *each([torch.reshape, T.reshape], x(3, 10), note="keywords", shape=(2, -1)),
    *each([T.view], x(3, 10), note="keywords", size=(2, 15)),
    *each([torch.reshape, T.reshape, T.view], x(1), (), note="scalar"),
    *each([torch.flatten, T.flatten], x(2, 3, 5)),
    *each([torch.flatten, T.flatten], x(2, 3, 5, 7), 1, -2, note="some axes"),
    *each([torch.flatten, T.flatten], x(), note="scalar"),
    *each([torch.flatten, T.flatten], x(2, 3, 5), note="keywords", start_dim=1),
    *each([torch.squeeze, T.squeeze], x(3, 1, 5, 1)),
    *each([torch.squeeze, T.squeeze], x(3, 1, 5, 1), -1, note="one axis"),
    *each([torch.squeeze, T.squeeze], x(3, 1, 5, 1), note="keywords", dim=(1, 3)),
    *each([torch.unsqueeze, T.unsqueeze], x(3, 5), 1),
    *each([torch.unsqueeze, T.unsqueeze], x(3, 5), note="keywords", dim=-1),
    *each([torch.permute, T.permute], x(2, 3, 5), (2, 0, 1)),
    *each([T.permute], x(2, 3, 5, 7), -1, 1, 0, 2, note="one by one"),
    *each([torch.permute, T.permute], x(2, 3, 5), note="keywords", dims=(1, -1, 0)),
    *each([torch.transpose, T.transpose], x(2, 3, 5), 0, -1),
    *each([torch.transpose, T.transpose], x(2, 3, 5), note="keywords", dim0=1, dim1=2),
    *each([torch.transpose, T.transpose], x(), 0, -1, note="scalar"),
    *each([T.T.__get__, torch.t, T.t, T.mT.__get__], x(3, 5)),
    *each([torch.t, T.t], x(5), note="vector"),
    *each([T.mT.__get__], x(2, 3, 5), note="batch"),
    Case(F.pad, (x(2, 3, 5), (1, 2))),
    Case(F.pad, (x(2, 3, 5, 7), [1, 0, 3, 2], "constant", -1.5), note="two axes, value"),
    Case(F.pad, (x(2, 3, 5), (-1, 2, 1, -2)), note="cut"),
    Case(F.pad, (x(2, 3, 5),), {"pad": (0, 1), "mode": "constant", "value": 2}, "keywords"),
    # copies
    *each([torch.clone, T.clone, T.contiguous], x(3, 5)),
    *each([torch.clone, T.clone, T.contiguous], x(3, 5), note="keywords",
          memory_format=torch.contiguous_format),
    *[Case(T.to, (x(3, 5), kind), note=str(kind), staircase=True)
      for kind in (torch.float32, torch.bfloat16)],
    Case(T.to, (x(3, 5), "cpu", torch.float64), note="device, type"),
    Case(T.to, (x(3, 5),), {"dtype": torch.float64, "copy": True}, "keywords"),
    Case(T.to, (x(3, 5), constant(x(2))), note="like another"),
    Case(T.to, (x(3, 5), torch.float64, False, True), note="copy"),
    Case(T.to, (x(2, 3, 5, 7),), {"memory_format": torch.channels_last}, note="channels last"),
    *[Case(f, (x(3, 5),), staircase=f is not T.double)
      for f in (T.float, T.double, T.bfloat16, T.half)],
    # adding up
    *each([torch.sum, T.sum, torch.mean, T.mean], x(3, 5)),
    *each([torch.sum, T.sum, torch.mean, T.mean], x(2, 3, 5), 1, note="one axis"),
    *each([torch.sum, T.sum, torch.mean, T.mean], x(2, 3, 5), (2, 0), True, note="kept axes"),
    *each([torch.sum, T.sum, torch.mean, T.mean], x(2, 3, 5), note="keywords", dim=(0, -1)),
    *each([torch.sum, T.sum, torch.mean, T.mean], x(2, 3, 5), note="axis", axis=1),
    *each([torch.sum, torch.mean], x(2, 3, 5), (), note="no axis named"),
    *each([torch.sum, torch.mean], x(), 0, note="scalar"),
    *[Case(f, (x(3, 5), 1), {"dtype": torch.float32}, "type", staircase=True)
      for f in (torch.sum, torch.mean)],
]  # fmt: skip

# The operands in which a rule is linear, or affine, while the others are held.
LINEAR_IN = {
    "linear": ["x", "weight", "bias"], "matmul": ["x", "y"], "conv2d": ["x", "weight", "bias"],
    "locally_connected2d": ["x", "weight", "bias"],
    "avg_pool2d": ["x"], "upsample_nearest": ["x"], "pad": ["x"], "dropout": ["x"],
    "nll_loss": ["x"], "cross_entropy": ["y"],
    "batch_norm": ["weight", "bias"], "layer_norm": ["weight", "bias"],
    "add": ["x", "y"], "sub": ["x", "y"], "mul": ["x", "y"], "div": ["x"], "neg": ["z"],
    "reshape": ["x"], "permute": ["x"], "clone": ["x"], "cast": ["x"], "sum": ["x"], "mean": ["x"],
}  # fmt: skip
