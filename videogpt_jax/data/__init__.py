"""Latent data sets: decoding, records on disk, the input pipeline, the simulated world."""
