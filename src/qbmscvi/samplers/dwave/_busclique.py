"""Clique and biclique embeddings by ``minorminer.busclique``, run as a script in a separate process.

The package does not import this file. On a working graph that lacks couplers busclique can take minutes, or end its
process (``std::bad_alloc``); neither may happen to a training run. The script reads a request as JSON from standard
input and writes the chains as a JSON list, or null if there are none.
"""

from __future__ import annotations

import json
import sys
import warnings

warnings.simplefilter("ignore")  # dwave-networkx announces its successor


def main() -> None:
    """Answer the request on standard input."""
    import dwave_networkx as dnx
    from minorminer.busclique import busgraph_cache

    request = json.load(sys.stdin)
    build = {"chimera": dnx.chimera_graph, "pegasus": dnx.pegasus_graph, "zephyr": dnx.zephyr_graph}[request["family"]]
    lattice = build(*request["shape"], node_list=request["nodes"], edge_list=request["edges"])
    cache = busgraph_cache(lattice, seed=request["seed"])
    sizes = request["sizes"]
    find = cache.find_clique_embedding if len(sizes) == 1 else cache.find_biclique_embedding
    chains = find(*sizes)
    json.dump([list(chains[node]) for node in range(sum(sizes))] if chains else None, sys.stdout)


if __name__ == "__main__":
    main()
