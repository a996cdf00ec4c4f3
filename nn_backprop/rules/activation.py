"""Activations: what a neuron makes of its weighted sum.

Most act on every element alone, a = σ(z), so that their Jacobian is diagonal and the chain rule is
one product an element: grad_z = grad_a · σ'(z). `elementwise` says that once; each of them adds its
σ and its σ'. Where σ' is simplest in terms of the result, as for the sigmoid, the result is saved
instead of the input. Softmax and its logarithm couple the elements of an axis and stand last.

Letters: n every axis but the one that is normalised, k and j places along that axis. [condition] is
1 where the condition holds, else 0.
"""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def elementwise(function: Callable, slope: Callable) -> tuple[Callable, Callable]:
    """The two halves of a rule for a = σ(z), element by element.

    `function(z, *constants)` is σ. `slope(z, *constants)` or `slope(a, *constants)` is σ', and the
    name of its first argument says whether the input or the output is saved. The docstring of
    `slope` is the derivation, and its constants are the forward's.
    """
    first, *constants = inspect.signature(slope).parameters.values()

    def forward(z: Float[Tensor, "..."], *constants) -> tuple[Float[Tensor, "..."], tuple]:
        a = function(z, *constants)
        return a, (a if first.name == "a" else z, constants)

    def backward(grad_a: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
        z_or_a, constants = saved
        return (grad_a * slope(z_or_a, *constants) if needs[0] else None,)

    forward.__doc__ = slope.__doc__
    forward.__module__ = backward.__module__ = slope.__module__
    z = inspect.signature(forward).parameters["z"]
    forward.__signature__ = inspect.Signature([z, *constants])  # type: ignore[attr-defined]
    return forward, backward


def _relu_slope(a):
    """The positive part; 0 elsewhere.

    Forward:
        a = max(z, 0)

    Derivation:
        For z > 0 the function is z, with derivative 1; for z < 0 it is constant. At z = 0 the two
        one-sided slopes are 1 and 0; we take 0, as torch does. Since a > 0 exactly where z > 0, the
        result says all that is needed.

    Backward:
        grad_z = grad_a · [a > 0]

    Saved:
        a, so that the input may be overwritten.

    Shapes:
        z and a have the same shape.

    Source:
        Nair & Hinton 2010, Rectified linear units improve restricted Boltzmann machines.
    """
    return a.sign()  # a is not negative, so this is [a > 0]


relu_forward, relu_backward = elementwise(torch.relu, _relu_slope)


def _leaky_relu_slope(z, negative_slope=0.01):
    """The input where it is positive, a small multiple of it elsewhere.

    Forward:
        a = z if z > 0 else negative_slope · z

    Derivation:
        Two straight lines that meet at 0, where we take the left one's slope, as torch does. The
        input is saved, not the result: with negative_slope < 0 the sign of a would not tell
        on which line z lies.

    Backward:
        grad_z = grad_a · (1 if z > 0 else negative_slope)

    Saved:
        z.

    Shapes:
        z and a have the same shape.

    Source:
        Maas, Hannun & Ng 2013, Rectifier nonlinearities improve neural network acoustic models.
    """
    return torch.where(z > 0, torch.ones_like(z), negative_slope)  # numbers alone make float32


leaky_relu_forward, leaky_relu_backward = elementwise(F.leaky_relu, _leaky_relu_slope)


def _sigmoid_slope(a):
    """Squashes the real line into (0, 1).

    Forward:
        a = 1 / (1 + e^−z)

    Derivation:
        a = (1 + e^−z)^−1, so da/dz = (1 + e^−z)^−2 · e^−z = a · e^−z / (1 + e^−z) = a (1 − a),
        since 1 − a = e^−z / (1 + e^−z).

    Backward:
        grad_z = grad_a · a (1 − a)

    Saved:
        a.

    Shapes:
        z and a have the same shape.

    Source:
        Rumelhart, Hinton & Williams 1986, equation 2 and the step to equation 5.
    """
    return a * (1 - a)


sigmoid_forward, sigmoid_backward = elementwise(torch.sigmoid, _sigmoid_slope)


def _tanh_slope(a):
    """Squashes the real line into (−1, 1).

    Forward:
        a = sinh z / cosh z

    Derivation:
        The quotient rule with sinh' = cosh and cosh' = sinh gives
        da/dz = (cosh² z − sinh² z) / cosh² z = 1 − a².

    Backward:
        grad_z = grad_a · (1 − a²)

    Saved:
        a.

    Shapes:
        z and a have the same shape.

    Source:
        LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, section 4.4.
    """
    return 1 - a * a


tanh_forward, tanh_backward = elementwise(torch.tanh, _tanh_slope)


def _gelu_slope(z, approximate="none"):
    """The input times the share of a standard normal distribution that lies below it.

    Forward:
        a = z Φ(z),  Φ(z) = ½ (1 + erf(z / √2)),  erf(t) = 2/√π ∫₀ᵗ e^(−r²) dr
        approximate="tanh":  a = ½ z (1 + tanh u),  u = √(2/π) (z + 0.044715 z³)

    Derivation:
        The product rule, with Φ' = φ, the normal density φ(z) = e^(−z²/2) / √(2π). For the tanh
        form it is the product rule again, with d tanh u = (1 − tanh² u) du and
        du/dz = √(2/π) (1 + 3 · 0.044715 z²).

    Backward:
        grad_z = grad_a · (Φ(z) + z φ(z))
        approximate="tanh":  grad_z = grad_a · (½ (1 + tanh u) + ½ z (1 − tanh² u) du/dz)

    Saved:
        z.

    Shapes:
        z and a have the same shape.

    Source:
        Hendrycks & Gimpel 2016, Gaussian error linear units, section 2.
    """
    if approximate == "none":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * du


def _gelu(z, approximate="none"):
    return F.gelu(z, approximate=approximate)


gelu_forward, gelu_backward = elementwise(_gelu, _gelu_slope)


def _cos_slope(z):
    """A wave: what a random feature of a kernel makes of its weighted sum.

    Forward:
        a = cos z

    Derivation:
        By the addition theorem (cos(z + h) − cos z) / h = cos z (cos h − 1) / h − sin z sin h / h.
        As h goes to 0, the first quotient goes to 0 and the second to 1; what is left is −sin z.

    Backward:
        grad_z = −grad_a · sin z

    Saved:
        z: the cosine does not tell the sign of the sine.

    Shapes:
        z and a have the same shape.

    Source:
        Rahimi & Recht 2007, Random features for large-scale kernel machines, algorithm 1.
    """
    return -torch.sin(z)


cos_forward, cos_backward = elementwise(torch.cos, _cos_slope)


def softmax_forward(
    z: Float[Tensor, "..."], dim: int, dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "..."], tuple]:
    """Turns the scores along an axis into shares: positive, with sum 1.

    Forward:
        a[n,k] = e^z[n,k] / Σ_j e^z[n,j]

    Derivation:
        Drop the letter n. With s = Σ_j e^z[j], the quotient rule gives
        ∂a[k]/∂z[j] = [k = j] e^z[k] / s − e^z[k] e^z[j] / s² = a[k] ([k = j] − a[j]).
        Every a[k] depends on every z[j], so
        grad_z[j] = Σ_k grad_a[k] a[k] ([k = j] − a[j]) = a[j] (grad_a[j] − Σ_k grad_a[k] a[k]).
        Adding a constant to all z changes nothing, so the entries of grad_z have sum 0.

    Backward:
        grad_z[n,j] = a[n,j] (grad_a[n,j] − Σ_k grad_a[n,k] a[n,k])

    Saved:
        a.

    Shapes:
        z and a have the same shape; the axis of k is `dim`.

    Source:
        Bridle 1990, Probabilistic interpretation of feedforward classification network outputs.
    """
    a = torch.softmax(z, dim, dtype=dtype)
    return a, (a, dim, z.dtype)


def softmax_backward(grad_a: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    a, dim, dtype = saved
    if not needs[0]:
        return (None,)
    return ((a * (grad_a - (grad_a * a).sum(dim, keepdim=True))).to(dtype),)


def log_softmax_forward(
    z: Float[Tensor, "..."], dim: int, dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "..."], tuple]:
    """The logarithm of softmax, computed without forming the small numbers themselves.

    Forward:
        a[n,k] = z[n,k] − log Σ_j e^z[n,j]

    Derivation:
        Drop the letter n. The derivative of log Σ_i e^z[i] with respect to z[j] is
        e^z[j] / Σ_i e^z[i] = e^a[j], the softmax. So
        ∂a[k]/∂z[j] = [k = j] − e^a[j], and grad_z[j] = Σ_k grad_a[k] ([k = j] − e^a[j]).

    Backward:
        grad_z[n,j] = grad_a[n,j] − e^a[n,j] Σ_k grad_a[n,k]

    Saved:
        a.

    Shapes:
        z and a have the same shape; the axis of k is `dim`.

    Source:
        Bridle 1990; for log Σ exp, Boyd & Vandenberghe 2004, Convex optimization, section 3.1.5.
    """
    a = torch.log_softmax(z, dim, dtype=dtype)
    return a, (a, dim, z.dtype)


def log_softmax_backward(grad_a: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple:
    a, dim, dtype = saved
    if not needs[0]:
        return (None,)
    return ((grad_a - a.exp() * grad_a.sum(dim, keepdim=True)).to(dtype),)
