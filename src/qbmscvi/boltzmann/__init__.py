"""Boltzmann machines: Ising problems, priors and posteriors over spins, log Z.

Nothing here knows of cells, or of samplers.
"""
