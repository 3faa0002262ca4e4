"""Forward and backward of an implementation made one differentiable function."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

OUTPUT = "attention"  # checkpoint name of what the backward pass needs to not attend again


def differentiable(forward: Callable[..., tuple[Array, Array]],
                   backward: Callable[..., tuple[Array, Array, Array]]) -> Callable[..., Array]:
  """`forward` with `backward` as its gradient (custom VJP).

  What the backward pass keeps are the inputs, the output and the log-sum-exp of each row's
  scores: never anything as large as the scores (Dao et al., FlashAttention-2, arXiv
  2307.08691).

  Args:
    forward: (q, k, v, ranks_q, ranks_k, block_map) to the output and the log-sum-exp, which
      may have any shape and unit that `backward` understands.
    backward: the same arguments, then output, log-sum-exp and the output's gradient; gives
      the gradients of q, k and v.
  """
  @jax.custom_vjp
  def attend(*inputs: Any) -> Array:
    return forward(*inputs)[0]

  def with_residuals(*inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    out, lse = (checkpoint_name(x, OUTPUT) for x in forward(*inputs))
    return out, (*inputs, out, lse)

  def gradients(residuals: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
    return (*backward(*residuals, grad), None, None, None)  # ranks and blocks are integers

  attend.defvjp(with_residuals, gradients)
  return attend
