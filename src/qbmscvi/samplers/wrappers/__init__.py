"""Wrappers of samplers: temperature, ranges, gauges, retries, budgets, recordings, vetting."""
