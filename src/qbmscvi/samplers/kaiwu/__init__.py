"""Coherent Ising machines of QBoson, through the Kaiwu SDK."""
