"""Samplers with the interface of dimod, those of dwave-samplers among them."""
