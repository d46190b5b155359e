"""Draw `layers.svg`, the picture of the one-way rule, from the import contract in `pyproject.toml`.

Run it after a change of the contract; a test compares the picture with the contract.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "_static" / "layers.svg"
WIDTH, ROW, GAP, MARGIN = 760, 34, 12, 16


def layers() -> list[list[str]]:
    """Modules of each layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract for contract in contracts if contract["type"] == "layers")["layers"]
    return [[name.strip(" ()") for name in row.split("|")] for row in rows]


def knows_single_cells() -> set[str]:
    """Modules that may import anndata, lightning or scvi."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    spin_side = next(contract for contract in contracts if contract["type"] == "forbidden")["source_modules"]
    return {name for row in layers() for name in row} - {name.removeprefix("qbmscvi.") for name in spin_side}


def draw() -> str:
    """Return the picture."""
    rows, upper = layers(), knows_single_cells()
    height = 2 * MARGIN + len(rows) * (ROW + GAP) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="ui-monospace, Menlo, monospace" font-size="12.5">',
        "<title>Layers of the package: imports point down</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for i, names in enumerate(rows):
        y = MARGIN + i * (ROW + GAP)
        box = (WIDTH - 2 * MARGIN - 40 - (len(names) - 1) * GAP) / len(names)
        for j, name in enumerate(names):
            x = MARGIN + j * (box + GAP)
            fill, line = ("#e8f1f8", "#0072B2") if name in upper else ("#fdf0d9", "#E69F00")
            parts += [
                f'<rect x="{x:.1f}" y="{y}" width="{box:.1f}" height="{ROW}" rx="4" fill="{fill}" stroke="{line}"/>',
                f'<text x="{x + box / 2:.1f}" y="{y + 21}" text-anchor="middle" fill="#222222">{name}</text>',
            ]
    x, bottom = WIDTH - MARGIN - 14, MARGIN + len(rows) * (ROW + GAP) - GAP
    parts += [
        f'<line x1="{x}" y1="{MARGIN}" x2="{x}" y2="{bottom - 6}" stroke="#555555" stroke-width="2"/>',
        f'<path d="M{x - 6},{bottom - 8} L{x},{bottom} L{x + 6},{bottom - 8} z" fill="#555555"/>',
        f'<text x="{x - 8}" y="{(MARGIN + bottom) / 2}" text-anchor="middle" fill="#555555" '
        f'transform="rotate(-90 {x - 8} {(MARGIN + bottom) / 2})">imports</text>',
        f'<rect x="{MARGIN}" y="{bottom + 14}" width="12" height="12" fill="#e8f1f8" stroke="#0072B2"/>',
        f'<text x="{MARGIN + 18}" y="{bottom + 25}" fill="#222222">knows single cells</text>',
        f'<rect x="{MARGIN + 190}" y="{bottom + 14}" width="12" height="12" fill="#fdf0d9" stroke="#E69F00"/>',
        f'<text x="{MARGIN + 208}" y="{bottom + 25}" fill="#222222">spins and samplers, without them</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw())
