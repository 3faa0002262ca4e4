"""Benchmarks: what runs them, and the reports they leave."""
