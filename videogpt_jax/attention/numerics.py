"""What every implementation of attention does with numbers."""

from typing import Any

from jax import lax
import jax.numpy as jnp

MASKED = -1e30  # a score; finite: a row that has seen nothing yet must not make NaN


def precision(dtype: Any) -> lax.Precision:
  """Of products: accelerators would round float32 operands first, to bfloat16 or TF32."""
  return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
