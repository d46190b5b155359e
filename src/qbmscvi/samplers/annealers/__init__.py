"""Samplers with the interface of dimod, including those of dwave-samplers."""
