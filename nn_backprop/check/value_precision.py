"""The precision of an array is that of its values: float32 numbers may have been widened since."""

import torch
from torch import Tensor

FLOAT64, FLOAT32 = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
# A lower precision, and more bits than whole numbers or simple fractions take, as which values in
# that precision would otherwise pass.
PRECISIONS = {torch.bfloat16: 10, torch.float16: 13, torch.float32: 16}
FEW = 64  # numbers whose precision is judged together with that of the others


def precisions_of(arrays: dict[str, Tensor | None]) -> dict[str, float]:
    """The eps of each array: that of its type, or of a lower precision that its values have."""
    parts = [t.double().flatten() for t in arrays.values() if t is not None]
    together = torch.cat(parts) if parts else torch.empty(0)
    found = {}
    for name, array in arrays.items():
        if array is None:
            found[name] = 0.0
            continue
        values = together if array.numel() < FEW else array.double().flatten()
        some = values[:: max(1, values.numel() // 4096)]
        bits = _bits(some)
        found[name] = eps_of(array)
        for dtype, least in PRECISIONS.items():
            eps = torch.finfo(dtype).eps
            fits = bits > least and _last_bits(some, eps) and _fits(some, dtype)
            if eps > found[name] and fits and _fits(values, dtype):
                found[name] = eps
                break
    return found


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).double().nan_to_num(), values.nan_to_num())


def eps_of(array: Tensor) -> float:
    return torch.finfo(array.dtype).eps if array.is_floating_point() else FLOAT64


def _last_bits(values: Tensor, eps: float) -> bool:
    """Whether these numbers of that precision use its last bit, as about half of any do, but not
    powers of two."""
    values = values[values.isfinite() & (values != 0)]
    last = (torch.frexp(values).mantissa * 2 / eps).long() & 1
    return last.double().sum().item() > len(values) / 8


def _bits(values: Tensor) -> float:
    """How many bits the values take as multiples of one unit."""
    values = values[values.isfinite() & (values != 0)]
    if not values.numel():
        return 0.0
    mantissa, exponent = torch.frexp(values)
    whole = (mantissa * 2.0**53).long()
    lowest = exponent - 53 + torch.log2((whole & -whole).double())
    return float(exponent.max() - lowest.min())
