"""Boltzmann machines: Ising problems, priors and posteriors over spins, log Z.

Nothing in this folder imports cells or samplers.
"""
