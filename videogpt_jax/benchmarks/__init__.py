"""Benchmarks: `python -m videogpt_jax.benchmarks.NAME`; the last line is one JSON object."""
