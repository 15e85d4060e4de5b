"""A rank for torchrun: a small run whose second rank kills itself at its 20th step, once.

torchrun --nproc-per-node 2 --max-restarts 1 tests/killed_rank.py OUTPUT FLAGS
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import ranks  # noqa: E402 (a script: the repository must be on the path first)

if __name__ == "__main__":
    output, flags = sys.argv[1:]
    sys.exit(ranks.train_small(output, flags, ranks.on_rank(1, 20, ranks.kill_once)))
