"""Video-GPT (next clip diffusion) in JAX: pretraining and prediction of video world models."""

__version__ = "0.1.0"
