"""What the package promises about imports and about the two commands."""

import pathlib
import subprocess
import sys

import pytest

import videogpt_jax

_ROOT = pathlib.Path(videogpt_jax.__file__).parents[1]

# What runs where only jax, flax and friends are installed (a bare GPU machine).
_LEAN = ("attention", "backbone", "benchmarks.convert", "benchmarks.rollout",
         "benchmarks.train_step", "cache", "cli", "codec",
         "flops", "flow", "folder", "layout", "machine", "mask", "model", "objective", "phi3",
         "published", "rollout", "sampler", "sharding", "step", "tensors", "vae", "weights")
_DATA_PACKAGES = ("grain", "tensorflow_datasets", "ml_collections", "array_record", "av",
                  "tensorboardX", "pymunk", "skimage", "tensorflow", "torch")


def _python(code):
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_model_and_benchmarks_import_without_the_data_packages():
  imports = "; ".join(f"import videogpt_jax.{name}" for name in _LEAN)
  blocked = f"import sys; sys.modules.update(dict.fromkeys({_DATA_PACKAGES!r}))"
  result = _python(f"{blocked}; {imports}")
  assert result.returncode == 0, result.stderr


def test_training_imports_neither_tensorflow_nor_torch():
  result = _python("import sys; import videogpt_jax.train, videogpt_jax.encode, "
                   "videogpt_jax.predict; sys.exit('tensorflow' in sys.modules or "
                   "'torch' in sys.modules)")
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [
  "main", "encode", "inspect", "predict", "evaluate", "convert", "benchmarks.convert",
  "benchmarks.drift", "benchmarks.endless", "benchmarks.input_pipeline", "benchmarks.physics_iq",
  "benchmarks.rollout",
  "benchmarks.scaling", "benchmarks.train_step"])
def test_commands_explain_themselves(command):
  result = subprocess.run([sys.executable, "-m", f"videogpt_jax.{command}", "--help"],
                          capture_output=True, text=True, check=False)
  assert f"videogpt_jax.{command}" in result.stdout or "--" in result.stdout
  assert "Traceback" not in result.stderr


def test_main_is_short():
  lines = (_ROOT / "videogpt_jax" / "main.py").read_text().splitlines()
  assert len(lines) < 60
