"""What a layer can be built with: sizes, alone or in pairs, checked and refused in a sentence."""

from numbers import Integral

from nn_backprop.rules.convolution import pair


def require_integers(least: int = 1, **sizes: object) -> None:
    """ValueError, naming the argument, unless all are integers of at least `least`."""
    for name, size in sizes.items():
        if not _is_integer(size, least):
            raise ValueError(f"{name} must be an integer of at least {least}, not {size!r}")


def as_pairs(least: int = 1, **sizes: object) -> list[tuple[int, int]]:
    """Each argument as (vertical, horizontal), from one integer or two of at least `least`.

    Raises ValueError, naming the argument, for anything else.
    """
    found = []
    for name, size in sizes.items():
        axes = tuple(size) if isinstance(size, (tuple, list)) else (size,)
        if len(axes) not in (1, 2) or not all(_is_integer(axis, least) for axis in axes):
            raise ValueError(
                f"{name} must be an integer, or two, each at least {least}, not {size!r}"
            )
        found.append(pair(axes))
    return found


def _is_integer(size: object, least: int) -> bool:
    return isinstance(size, Integral) and int(size) >= least
