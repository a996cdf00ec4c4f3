"""A gradient of the wrong shape."""

from collections.abc import Iterator

from nn_backprop.check.diagnosis.mismatch import Hypothesis
from nn_backprop.check.diagnosis.search import EXACT, Search


def not_reduced(s: Search) -> Iterator[Hypothesis]:
    """It was not summed, or kept a dimension, or is transposed."""
    actual, expected = s.m.actual, s.m.expected
    options = []
    for i, edges in s.edges.items():
        if s.g.nodes[i].op == "expand" and 0 in edges:
            u = s.upstream[i][0]
            text = f"is not summed over the {u.numel() // edges[0].numel()} uses of {s.g.out(i)}"
            options.append(("wrong-reduction", text, u))
    if expected.dim() == 2:
        options.append(("transposed", "is transposed", expected.T))
    if actual.numel() == expected.numel():
        text = f"has the shape {tuple(actual.shape)}"
        options.append(("wrong-reduction", text, expected.reshape(actual.shape)))
    bits = 2.0
    for kind, text, wrong in options:
        if wrong.shape == actual.shape:
            left = float((wrong - actual).norm()) / (float(actual.norm()) or 1.0)
            if left <= EXACT:
                yield s.hypothesis(bits, kind, text, left)
                bits += 1
