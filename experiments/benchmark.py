"""How fast, next to a named peer that is timed in the same run?

    python experiments/benchmark.py engines             # a step of each engine against autograd's
    python experiments/benchmark.py time-to-accuracy    # MNIST, from the textbook loop down
    python experiments/benchmark.py many                # 64 networks at once, and one by one
    python experiments/benchmark.py checker             # check_gradients against gradcheck
    python experiments/benchmark.py memory              # peaks, and what grows over 10,000 steps
    python experiments/benchmark.py scaling             # batch sizes, widths, threads
    python experiments/benchmark.py startup             # import nn_backprop against import torch

`--help` after a name shows its options. With `--smoke` each takes seconds and reads the embedded
digits. What is measured, and what came out: results/benchmark-NAME/README.md.
"""

import importlib
import sys

NAMES = ("engines", "time-to-accuracy", "many", "checker", "memory", "scaling", "startup")


def main(arguments: list[str]) -> int:
    """Runs the measure; returns its exit code: 0, or 2 for what could not be run."""
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in NAMES:
        print(f"benchmark.py: there is no {name!r}: choose from {', '.join(NAMES)}",
              file=sys.stderr)  # fmt: skip
        return 2
    measure = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    return measure.STUDY.main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
