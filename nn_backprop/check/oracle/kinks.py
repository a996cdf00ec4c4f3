"""At a kink there is no derivative, and any value between the one-sided slopes is as good.

At 0, ReLU rises by 0 to the left and by 1 to the right: a backward may answer 0, ½ or 1. Where two
entries tie for a maximum it may give the gradient to either, or half to each. But each element by
itself is not enough. In a tie of four, the slopes along each element are 0 and 1, so a backward
that gives all four the whole gradient stays inside for each of them; along their sum, where all
four rise together and stay tied, the maximum rises by 1, and it says 4. So the derivative along
the directions that tied elements share has to be right too.
"""

import torch
from torch import Tensor

from nn_backprop.check.oracle.directions import unit
from nn_backprop.check.oracle.oracle import Oracle

MOST = 64  # elements looked at; if these are kinks, so are the others
STEPS = (2e-5, 1e-5)
RTOL = 1e-4  # of one-sided slopes, which are extrapolated over two steps


def accepted(
    oracle: Oracle, name: str, actual: Tensor, expected: Tensor, tolerance: float,
    upstream: list[Tensor],
) -> str:  # fmt: skip
    """Where `actual` differs from `expected` at kinks only, and is one of the possible answers, a
    sentence that says so; else nothing."""
    count, chosen = _wrong(actual, expected, tolerance)
    if not chosen:
        return ""
    value = oracle.target.values[name]
    scale = value.double().abs().max().item() or 1.0
    flat = actual.flatten()

    def within(direction: Tensor, must_be_kink: bool) -> Tensor | None:
        """Which outputs the direction moves, if what `actual` says along it is possible."""
        right, moved_right = _one_sided(oracle, name, direction, upstream, scale)
        fall, moved_left = _one_sided(oracle, name, -direction, upstream, scale)
        left, claimed = -fall, (flat * direction).sum().item()
        size = max(abs(left), abs(right), tolerance)
        if must_be_kink and abs(left - right) <= 10 * RTOL * size:
            return None
        slack = RTOL * size + tolerance * direction.abs().sum().item()
        if not min(left, right) - slack <= claimed <= max(left, right) + slack:
            return None
        return moved_left | moved_right

    groups: list[tuple[Tensor, Tensor]] = []  # (elements, the outputs that they move)
    for i in chosen:
        direction = unit(flat, i)
        moved = within(direction, must_be_kink=True)
        if moved is None:
            return ""
        elements = direction > 0
        apart = []
        for other_elements, other_moved in groups:  # elements that move one output belong together
            if (other_moved & moved).any():
                elements, moved = elements | other_elements, moved | other_moved
            else:
                apart.append((other_elements, other_moved))
        groups = [*apart, (elements, moved)]
    for elements, moved in groups:
        together = elements | _sharing(oracle, name, moved, upstream)
        same = (value.flatten().double() == value.flatten().double()[elements][0]) & together
        for direction in (together, same | elements):
            if within(direction.double(), must_be_kink=False) is None:
                return ""
    where = f"{count} of {flat.numel()} entries lie at a kink"
    return f"{where}, where any value between the one-sided slopes is right"


def unseen(
    oracle: Oracle, name: str, actual: Tensor, expected: Tensor, tolerance: float,
    upstream: list[Tensor],
) -> bool:  # fmt: skip
    """Whether `expected`, from differences, is refuted where `actual` differs from it: the
    shortest steps that rounding lets see that difference agree with `actual`, or lie astride a
    kink, which longer steps cannot see, with `actual` between its slopes."""
    _, chosen = _wrong(actual, expected, tolerance)
    flat, right = actual.flatten(), expected.flatten()
    return bool(chosen) and all(
        _refuted(oracle, name, i, flat[i].item(), right[i].item(), upstream) for i in chosen
    )


def _wrong(actual: Tensor, expected: Tensor, tolerance: float) -> tuple[int, list[int]]:
    """How many entries differ, and at most MOST of them; none if `actual` is not finite."""
    wrong = ((actual - expected).abs() > tolerance).flatten().nonzero().flatten()
    if not len(wrong) or not actual.isfinite().all():
        return 0, []
    chosen = wrong[torch.linspace(0, len(wrong) - 1, min(len(wrong), MOST)).long()]
    return len(wrong), chosen.tolist()


def _refuted(
    oracle: Oracle, name: str, i: int, actual: float, expected: float, upstream: list[Tensor]
) -> bool:
    outputs, _ = oracle.differences.along(name, unit(oracle.target.values[name], i))
    error = abs(actual - expected)
    step = 50 * oracle.differences.rounding(upstream) / error  # rounding is then 2 % of the error
    if not 0 < step < 1:
        return False

    def slope(h: float) -> float:
        rises = zip(outputs(h), outputs(0.0), upstream, strict=True)
        return sum(((p - q) * u).sum().item() for p, q, u in rises) / h

    left, ahead = slope(-step), slope(step)
    bend, bend_of_longer = abs(ahead - left), abs(slope(2 * step) - slope(-2 * step))
    low = high = (left + ahead) / 2
    # The bend of a smooth function grows with the step, that of a kink does not.
    if 0.1 * max(abs(left), abs(ahead)) < bend and bend_of_longer < 1.5 * bend:
        low, high = min(left, ahead), max(left, ahead)
    return low - 0.1 * error <= actual <= high + 0.1 * error


def _one_sided(
    oracle: Oracle, name: str, direction: Tensor, upstream: list[Tensor], scale: float
) -> tuple[float, Tensor]:
    """The slope of ⟨u, f⟩ towards a direction, from two steps, and which outputs move."""
    direction = direction.reshape(oracle.target.values[name].shape)
    outputs, _ = oracle.differences.along(name, direction)
    zero, *moved = (_flat(outputs(scale * step)) for step in (0.0, *STEPS))
    u, rises = _flat(upstream), [z - zero for z in moved]
    pairs = zip(rises, STEPS, strict=True)
    coarse, fine = ((rise * u).sum().item() / (scale * step) for rise, step in pairs)
    return 2 * fine - coarse, rises[1] != 0


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def _sharing(oracle: Oracle, name: str, moved: Tensor, upstream: list[Tensor]) -> Tensor:
    """The elements whose gradient, by the plain forward, reaches the outputs in `moved`."""
    value = oracle.target.values[name]
    if name not in oracle.plain:
        return torch.zeros(value.numel(), dtype=torch.bool)
    parts = moved.split([u.numel() for u in upstream])
    masked = [u * part.reshape(u.shape) for u, part in zip(upstream, parts, strict=True)]
    return oracle.at(masked)[name].flatten() != 0
