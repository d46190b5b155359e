"""The frame of a study on the data sets of ``results.py``: options, records that are kept, and a table from them."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from results import DATA_SETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Measure = Callable[[str, int, argparse.Namespace, list[dict]], Iterable[dict]]

HERE = Path(__file__).parent
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("qbmscvi", "scvi-tools", "torch", "numpy"))


def run_study(
    name: str, doc: str, measure: Measure, write_table: Callable[[pd.DataFrame, Path], None], **settings: int
) -> None:
    """Run what the records lack, one line of ``name.jsonl`` each, and write ``NAME.md``.

    ``measure`` gets a data set, a seed, the options and the records that these have, and yields the missing ones. Each
    of ``settings`` becomes an option with this default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the .h5ad")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for option, default in settings.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in [] if options.table_only else options.seeds:
        for data in options.sets:
            done = [record for record in records if (record["data"], record["seed"]) == (data, seed)]
            for record in measure(data, seed, options, done):
                record = {"data": data, "seed": seed, **record, "versions": VERSIONS}
                print(json.dumps(record), flush=True)
                records.append(record)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    table = HERE / f"{name.upper()}.md"
    write_table(pd.DataFrame(records), table)
    versions = sorted({record["versions"] for record in records if "versions" in record})
    with table.open("a") as file:
        file.writelines(f"\nMade with {line}.\n" for line in versions)
