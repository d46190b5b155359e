"""Samplers around samplers: temperature, ranges, gauges, retries, budgets, recordings, vetting."""
