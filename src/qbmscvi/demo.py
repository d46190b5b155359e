"""Demonstration in one command: train SCVI and QBMSCVI, and write tables and figures.

It is ``python -m qbmscvi.benchmark`` with other defaults: these two models, one seed, at most 20,000 cells, 100 epochs,
and figures of the cells. Without ``--data`` the cells are generated, with known types, batches and a branching order.
It takes all options of that command. One run of each model on one data set shows that everything works, but not which
model is better.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEFAULTS = "--models SCVI QBMSCVI --seeds 1 --epochs 100 --max-cells 20000 --save-latents".split()
_SYNTHETIC = "--label-key cell_type --batch-key batch --order-key pseudotime".split()
_HINT = "With `make demo` the options are DATA=, BATCH_KEY=, LABEL_KEY= and OUT=, and ARGS= for all others."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    from qbmscvi.benchmark.__main__ import main as run_comparison
    from qbmscvi.datasets import synthetic_counts

    parser = argparse.ArgumentParser(
        prog="python -m qbmscvi.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="an .h5ad file of raw counts, with --label-key; generated without it")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for tables and figures")
    options, others = parser.parse_known_args(argv)
    if options.data is None:
        options.data = options.out / "synthetic.h5ad"
        options.out.mkdir(parents=True, exist_ok=True)
        synthetic_counts().write_h5ad(options.data)
        others = [*_SYNTHETIC, *others]
    try:
        run_comparison([str(options.data), "--out", str(options.out), *_DEFAULTS, *others])
    except SystemExit as error:
        if error.code:
            print(_HINT, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
