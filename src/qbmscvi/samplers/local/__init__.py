"""Samplers that run in this process: block Gibbs, enumeration, tempering, a simulated coherent Ising machine."""
