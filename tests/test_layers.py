"""What is asked of every layer: its gradients, what it refuses, how it is shown."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from properties import (
    DTYPES,
    names_checked,
    passes_the_checker,
    product,
    refuses,
    same,
    same_gradients,
)
from torch import Tensor, nn

from nn_backprop import as_function, check_gradients, models, rules
from nn_backprop.layers import (
    KWinners,
    LocallyConnected2d,
    LowRankLinear,
    OctaveConv2d,
    RandomFourierFeatures,
    RandomFourierFeatures2d,
    TiedStack,
    UnitBiasConv2d,
    UntiedStack,
)
from nn_backprop.rules.locally_connected import locally_connected2d
from nn_backprop.rules.winners import k_winners
from nn_backprop.training import prune_smallest


def apart(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """No two entries, and no entry and 0, closer than 0.02: no small step changes who wins."""
    n = math.prod(shape)
    return ((torch.randperm(n) - n / 2 + 0.25) * 0.04).reshape(shape).to(dtype)


def winners(channels: int, k: float, training: bool = True) -> Callable[..., nn.Module]:
    """With handicaps of 1 and ½, after which the scores are still apart."""

    def made(**to: Any) -> nn.Module:
        layer = KWinners(channels, k, evaluation_factor=1.5, **to).train(training)
        layer.duty_cycle.copy_(math.log(2) / 1.5 * torch.randint(2, (channels,)))
        return layer

    return made


def pruned(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(layer)
    for share in (0.5, 0.3):
        prune_smallest(model, {"0": share})
    return model[0]


def square(**to: Any) -> nn.Module:
    return nn.Linear(7, 7, bias=False, **to)


FIELDS = (3, 5, (7, 11), (2, 3), (2, 3), (1, 0))  # channels, image, kernel, stride, padding
PATCHES = (3, 5, (11, 7), (2, 3), 1.7, (2, 1), (1, 0), (3, 2))  # the same, σ before, grid behind
HIGH, LOW = (2, 3, 5, 7), (2, 2, 3, 4)
# How a layer is made, and the shapes of its input.
LAYERS: dict[str, tuple[Callable[..., nn.Module], list[tuple[int, ...]]]] = {
    "low rank": (lambda **to: LowRankLinear(11, 7, 3, **to), [(5, 11)]),
    "tied": (lambda **to: TiedStack(square(**to), 3, torch.tanh), [(5, 7)]),
    "octave": (lambda **to: OctaveConv2d(5, 7, 3, 0.4, 0.6, **to), [HIGH, LOW]),
    "local": (lambda **to: LocallyConnected2d(*FIELDS, **to), [(2, 3, 7, 11)]),
    "features": (lambda **to: RandomFourierFeatures(3, 5, 1.7, **to), [(7, 3)]),
    "patches": (lambda **to: RandomFourierFeatures2d(*PATCHES, **to), [(2, 3, 11, 7)]),
    "winners": (winners(5, 0.3), [(3, 5, 2, 7)]),
    "pruned": (lambda **to: pruned(nn.Linear(45, 13, **to)), [(5, 45)]),
    "low rank of a layer": (
        lambda **to: LowRankLinear.from_linear(nn.Linear(11, 7, False, **to), 3), [(2, 5, 11)]
    ),
    "untied": (lambda **to: UntiedStack([square(**to) for _ in range(3)]), [(5, 7)]),
    "tied affine": (lambda **to: TiedStack(nn.Linear(7, 7, **to), 3, torch.relu), [(2, 5, 7)]),
    "tied conv2d": (
        lambda **to: TiedStack(nn.Conv2d(3, 3, (3, 5), padding=(1, 2), **to), 3, torch.tanh), [HIGH]
    ),
    "tied, pruned": (lambda **to: TiedStack(pruned(square(**to)), 3, torch.tanh), [(5, 7)]),
    "octave, first": (lambda **to: OctaveConv2d(5, 7, 3, 0, 0.6, **to), [(2, 5, 5, 7)]),
    "octave, last": (lambda **to: OctaveConv2d(5, 7, 3, 0.4, 0, **to), [HIGH, LOW]),
    "octave, plain": (lambda **to: OctaveConv2d(5, 7, 3, 0, 0, **to), [(2, 5, 5, 7)]),
    "unit bias": (lambda **to: UnitBiasConv2d(*FIELDS, **to), [(2, 3, 7, 11)]),
    "patches, gaussian": (
        lambda **to: RandomFourierFeatures2d(1, 5, 13, 5, 1.7, 2, 0, 2, "gaussian", **to),
        [(2, 1, 13, 13)],
    ),
    "winners, vectors": (winners(11, 3), [(5, 11)]),
    "winners, evaluation": (winners(5, 0.3, training=False), [(3, 5, 2, 7)]),
    "pruned conv2d": (lambda **to: pruned(nn.Conv2d(2, 5, (3, 5), **to)), [(2, 2, 5, 7)]),
    "pruned network": (
        lambda **to: nn.Sequential(
            pruned(nn.Conv2d(2, 3, 3, **to)), nn.Tanh(), nn.Flatten(), pruned(nn.Linear(3, 5, **to))
        ),
        [(5, 2, 3, 3)],
    ),
    "pruned, no bias": (lambda **to: pruned(nn.Linear(13, 3, bias=False, **to)), [(5, 13)]),
}  # fmt: skip


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, shapes = LAYERS[kind]
    draw = apart if "winners" in kind else torch.randn
    return make(dtype=dtype), [draw(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradients_pass_the_checker(kind):
    for dtype in DTYPES:
        layer, inputs = made(kind, dtype)
        before = copy.deepcopy(dict(layer.state_dict()))
        x = tuple(inputs) if len(inputs) > 1 else inputs[0]
        report = passes_the_checker(layer, x, second_order=True, case=(kind, dtype))
        assert names_checked(report) > {name for name, _ in layer.named_parameters()}, kind
        assert same(dict(layer.state_dict()), before), kind


class Scaled(nn.Module):
    """A layer whose input is multiplied by parameters: one of their gradients needs the input's."""

    def __init__(self, layer: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.layer, self.scales = layer, nn.ParameterList(map(torch.rand_like, inputs))

    def forward(self, inputs: Sequence[Tensor]) -> Any:
        scaled = [x * scale for x, scale in zip(inputs, self.scales, strict=True)]
        return self.layer(scaled if len(scaled) > 1 else scaled[0])


def test_the_tape_has_autograds_gradients():
    def loss(z: Any, upstream: tuple[Tensor, ...]) -> Tensor:
        return sum(map(product, z if isinstance(z, tuple) else (z,), upstream))

    for kind in LAYERS:
        layer, inputs = made(kind)
        model = Scaled(layer.eval(), inputs)
        z = model(inputs)
        upstream = tuple(map(torch.randn_like, z if isinstance(z, tuple) else (z,)))
        grads = same_gradients(model, loss, inputs, upstream, kind, rtol=1e-12)
        assert all(grad.any() for grad in grads.values()), kind


def test_the_checker_refuses_what_people_get_wrong():
    class Mean(as_function(rules.TABLE[locally_connected2d])):  # of the weight's gradients
        @staticmethod
        def backward(ctx, grad_z):
            grad_x, grad_weight, *rest = super(Mean, Mean).backward(ctx, grad_z)
            return grad_x, grad_weight.mean((0, 1), keepdim=True).expand_as(grad_weight), *rest

    class Straight(as_function(rules.TABLE[k_winners])):  # to the losers as well
        @staticmethod
        def backward(ctx, grad_z):
            return grad_z, None, None

    class Boosted(as_function(rules.TABLE[k_winners])):  # as if the boost, of 2, were passed on
        @staticmethod
        def backward(ctx, grad_z):
            return super(Boosted, Boosted).backward(ctx, 2 * grad_z)

    class Forgetful(TiedStack):  # of all steps but the last
        def forward(self, u):
            frozen = copy.deepcopy(self.layer).requires_grad_(False)
            return UntiedStack([*[frozen] * (self.depth - 1), self.layer], self.activation)(u)

    stack, u = made("tied")
    image, weight = torch.randn(2, 3, 5, 7).double(), torch.randn(4, 5, 2, 3, 2, 3).double()
    x, boost = apart(5, 11), torch.full((11,), 2.0, dtype=torch.float64)
    for wrong, inputs, reference in (
        (Mean, (image, weight), locally_connected2d),
        (lambda x: Straight.apply(x, 3, boost), (x,), None),
        (lambda x: Boosted.apply(x, 3, boost), (x,), None),
        (Forgetful(stack.layer, 3, torch.tanh), u, stack),
    ):
        assert check_gradients(wrong, *inputs, reference=reference).verdict == "fail", wrong


# --- what is refused, and how a layer is shown ---

LINEAR = nn.Linear(7, 7)
RIGHT: dict[Callable, dict[str, Any]] = {
    LowRankLinear: {"in_features": 11, "out_features": 7, "rank": 3},
    KWinners: {"channels": 7, "period": 9, "k": 3},
    TiedStack: {"layer": LINEAR, "depth": 3},
    models.tied_network: {"width": 5, "depth": 3, "in_features": 7, "classes": 2},
    models.untied_network: {"width": 5, "depth": 3, "in_features": 7, "classes": 2},
    OctaveConv2d: {"in_channels": 5, "out_channels": 7, "kernel_size": 3, "stride": 1},
    LocallyConnected2d: {
        "in_channels": 2, "out_channels": 3, "input_size": (5, 7), "kernel_size": 3,
    },
    UnitBiasConv2d: {"in_channels": 2, "out_channels": 3, "input_size": (5, 7), "kernel_size": 3},
    RandomFourierFeatures: {"in_features": 3, "out_features": 5},
    RandomFourierFeatures2d: {
        "in_channels": 1, "out_channels": 5, "input_size": 7, "kernel_size": 3, "stride": 1,
        "padding": 0, "grid": 2,
    },
}  # fmt: skip
PAIRS = {"input_size", "kernel_size", "stride", "padding", "grid"}
WRONG: list[tuple[Callable, str, Any, str]] = [
    (LowRankLinear, "rank", 8, "^rank must be at most 7, the smaller of the two sizes, not 8$"),
    *((KWinners, "k", k, f"k must be an integer of at least 1 or a share within 0 and 1, not {k}")
      for k in (0.0, 1.0, 2.5, -0.1, math.nan)),
    (KWinners, "boost", -1.0, "boost must be finite and not negative, not -1.0"),
    (KWinners, "boost", math.inf, "boost must be finite and not negative, not inf"),
    (KWinners, "decay", 1.1, "decay must be from 0 to 1, not 1.1"),
    (KWinners, "evaluation_factor", 0.9, "evaluation_factor must be at least 1, not 0.9"),
    (OctaveConv2d, "padding", None, "padding must be an integer, or two, .* at least 0, not None"),
    (OctaveConv2d, "padding", "valid", "keep the size of the maps, 'same' or .*, not 'valid'"),
    (OctaveConv2d, "padding", 0, r"keep the size of the maps, 'same' or \(1, 1\), not 0"),
    (OctaveConv2d, "kernel_size", 4, "kernel_size must be odd, to have a middle, not 4"),
    (OctaveConv2d, "stride", [1, 2], r"stride must be 1, not \[1, 2\]"),
    (OctaveConv2d, "alpha_in", 1, "alpha_in must be from 0 to below 1, not 1"),
    (OctaveConv2d, "alpha_out", -0.5, "alpha_out must be from 0 to below 1, not -0.5"),
    (OctaveConv2d, "alpha_in", 0.1, "alpha_in = 0.1 makes 0 of 5 channels low"),
    (OctaveConv2d, "alpha_out", 0.1, "alpha_out = 0.1 makes 0 of 7 channels low"),
    *((kind, name, wrong, sentence)
      for kind in (LocallyConnected2d, UnitBiasConv2d)
      for name, wrong, sentence in (
          ("stride", 0, "stride must be at least 1"),
          ("padding", -1, "padding must not be negative"),
          ("padding", "full", "'valid', 'same' or a number, not 'full'"),
          ("kernel_size", (3, 8), "3 × 8 pixels does not fit into an image of 5 × 7"))),
    *((kind, "sigma", sigma, "sigma must be positive and finite")
      for kind in (RandomFourierFeatures, RandomFourierFeatures2d)
      for sigma in (0.0, -1.0, math.nan, math.inf)),
    (RandomFourierFeatures2d, "padding", -1, "padding .* at least 0, not -1"),
    (RandomFourierFeatures2d, "grid", 6, r"larger than the map of \(5, 5\) patches"),
    (RandomFourierFeatures2d, "kernel_size", 8, r"larger than an image of \(7, 7\)"),
    (RandomFourierFeatures2d, "pooling", "max", r"\['average', 'gaussian'\], not 'max'"),
]  # fmt: skip


def test_what_cannot_be_built_is_named():
    for kind, right in RIGHT.items():
        kind(**right)
        for name in right.keys() - {"layer", "k"}:
            pair = name in PAIRS
            least = 0 if name == "padding" else 1
            for wrong in ((3, 0.5), (3, 3, 3), (), "3", 3.0) if pair else (0, -2, 3.0, "3", None):
                be = "an integer, or two, each" if pair else "an integer of"
                sentence = f"^{name} must be {be} at least {least}, not {re.escape(repr(wrong))}$"
                refuses(sentence, kind, **(right | {name: wrong}))
            if pair and least:
                refuses(f"^{name} must be .*, not 0$", kind, **(right | {name: 0}))
    for kind, name, wrong, sentence in WRONG:
        refuses(sentence, kind, **(RIGHT[kind] | {name: wrong}))
    refuses("k must be an integer of at least 1, not 0", KWinners, 7, 0)
    refuses("a stack needs one layer or more", UntiedStack, [])
    refuses("'same' needs stride 1", LocallyConnected2d, 2, 3, (5, 7), 3, 2, "same")


def test_inputs_that_do_not_fit_are_named():
    built = {kind: kind(**right) for kind, right in RIGHT.items()}
    for kind, sentence, *shapes in (
        (KWinners, r"the layer takes \(N, 7, ...\), not \(", (7,), (3, 5), (3, 5, 7, 7)),
        (LocallyConnected2d, "images of 5 × 7 pixels, not 5 × 5", (1, 2, 5, 5)),
        (UnitBiasConv2d, "images of 5 × 7 pixels, not 5 × 5", (1, 2, 5, 5)),
        (RandomFourierFeatures2d, r"takes an image \(1, 7, 7\) or a batch of them, not \(",
         (1, 1, 7, 8), (7, 7), (1, 1, 1, 7, 7)),
    ):  # fmt: skip
        for shape in shapes:
            refuses(sentence, built[kind], torch.zeros(shape))
    for layer, shape, made_of_it in (
        (nn.Linear(7, 1), (5, 7), (5, 1)),  # the sum would broadcast
        (nn.Linear(7, 11), (5, 7), (5, 11)),
        (nn.Conv2d(3, 3, 3), (2, 3, 5, 7), (2, 3, 3, 5)),
    ):
        said = f"the layer makes {made_of_it} of {shape}: a layer of a stack must keep the shape"
        for stack in (TiedStack(layer, 2), UntiedStack([nn.Identity(), layer])):
            assert refuses("", stack, torch.randn(shape)) == said
    octave, (high, low) = OctaveConv2d(5, 7, 3, 0.4, 0.6), map(torch.randn, (HIGH, LOW))
    for x in ((), [], "high", ("high", "low"), (high, None), None, (high, low, low), high, (high,),
              (low, high), (high, low[..., :3]), (high[0], low[0]), (high, low[:1])):  # fmt: skip
        refuses(r"takes a pair of \(N, 3, H, W\) and \(N, 2, ⌈H/2⌉", octave, x)
    first = OctaveConv2d(5, 7, 3, 0, 0.6)
    refuses(r"takes \(N, 5, H, W\), not \(2, 3, 5, 7\) and", first, (high, low))
    refuses(r"takes \(N, 5, H, W\), not nothing", first, ())


def test_how_a_layer_is_shown():
    fields = "(2, 3, input_size=(5, 7), kernel_size=(3, 3), stride=2, padding=1, bias=False)"
    for layer, shown in (
        (LowRankLinear(11, 7, 3, False), "(in_features=11, out_features=7, rank=3, bias=False)"),
        (KWinners(7, 0.25),
         "(7, k=0.25, boost=1.5, decay=0.85, period=1000, evaluation_factor=1)"),
        (OctaveConv2d(5, 7, 3, 0.4, 0, bias=False),
         "(5, 7, kernel_size=(3, 3), alpha_in=0.4, alpha_out=0, bias=False)"),
        (LocallyConnected2d(2, 3, (5, 7), 3, 2, 1, False), fields),
        (UnitBiasConv2d(2, 3, (5, 7), 3, 2, 1, False), fields),
        (RandomFourierFeatures(3, 5, 1.7, 3), "(in_features=3, out_features=5, sigma=1.7, seed=3)"),
        (RandomFourierFeatures2d(1, 5, 7, 3, grid=2),
         "(1, 5, kernel_size=(3, 3), input_size=(7, 7), sigma=1, stride=(1, 1), padding=(0, 0), "
         "grid=(2, 2), pooling='average', seed=0)"),
    ):  # fmt: skip
        assert repr(layer) == type(layer).__name__ + shown
    assert "depth=5" in repr(TiedStack(LINEAR, 5))
