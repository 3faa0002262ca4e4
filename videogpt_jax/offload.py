"""An optimizer whose moments lie in the host's memory, and come to the device layer by layer.

Fetched all at once they would take as much of the device's memory at the end of a step as they
leave free before it. So the stack's layers are updated one after the other, in a loop; only the
parameters outside of the stack, few, are updated together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
import optax

_HERE, _THERE = jax.memory.Space.Device, jax.memory.Space.Host
_STACK = ("backbone", "layers")  # where parameters, and moments of theirs, have layers in front


def update(
    optimizer: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    good: Bool[Array, ""],
) -> tuple[Any, Any]:
  """Updates of the parameters, and the new state, its arrays with axes in the host's memory.

  Args:
    optimizer: treats every layer of the stack by itself; a clipping of the norm of all gradients
      must be over already.
    grads: by parameter; their memory is taken for the updates.
    state: of `optimizer.init`, arrays with axes in the host's memory.
    params: parameters.
    good: where False, the state stays.
  """
  rest_updates, rest_state = _fetched(optimizer, _rest(grads), _rest(state), _rest(params), good)
  layers_state, mask = _layers(state), _stacked(state)
  leaves, tree = jax.tree.flatten(layers_state)
  rows = _layers(params)
  count = jax.tree.leaves(rows)[0].shape[0]

  def one(i: Array, carry: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
    updates, moments = carry
    row = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1)
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i, 0)
    # What is no moment, a counter, is the same for all layers.
    picked = [row(x) if stacked else x for x, stacked in zip(moments, mask, strict=True)]
    own, new = _fetched(optimizer, jax.tree.map(row, updates), jax.tree.unflatten(tree, picked),
                        jax.tree.map(row, rows), good)
    moments = [put(x, y) if stacked else x
               for x, y, stacked in zip(moments, jax.tree.leaves(new), mask, strict=True)]
    return jax.tree.map(put, updates, own), moments

  updates, moments = jax.lax.fori_loop(0, count, one, (_layers(grads), leaves))
  return (_merged(grads, updates, rest_updates),
          _merged(state, jax.tree.unflatten(tree, moments), rest_state))


def _fetched(optimizer: optax.GradientTransformation, grads: Any, state: Any, params: Any,
             good: Array) -> tuple[Any, Any]:
  """An update with the state brought here and back."""
  here = jax.tree.map(lambda x: jax.device_put(x, _HERE) if x.ndim else x, state)
  updates, new = optimizer.update(grads, here, params)
  new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, here)
  return updates, jax.tree.map(lambda x: jax.device_put(x, _THERE) if x.ndim else x, new)


# Parts of trees that hold parameters, or what looks like them -----------------------------


def _holds(x: Any) -> bool:
  return isinstance(x, dict) and _STACK[0] in x


def _layers(tree: Any) -> Any:
  """The tree with the stack's layers alone, at the same paths, and what is no parameter's."""
  part = lambda x: {_STACK[0]: {_STACK[1]: x[_STACK[0]][_STACK[1]]}} if _holds(x) else x
  return jax.tree.map(part, tree, is_leaf=_holds)


def _rest(tree: Any) -> Any:
  """The tree without the stack's layers."""
  def part(x: Any) -> Any:
    if not _holds(x):
      return x
    return {**x, _STACK[0]: {name: y for name, y in x[_STACK[0]].items() if name != _STACK[1]}}

  return jax.tree.map(part, tree, is_leaf=_holds)


def _in_stack(path: tuple[Any, ...]) -> bool:
  return _STACK[1] in [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _stacked(state: Any) -> list[bool]:
  """For each leaf of `_layers(state)`, whether it has layers in front."""
  return [_in_stack(path) for path, _ in jax.tree_util.tree_leaves_with_path(_layers(state))]


def _merged(like: Any, layers: Any, rest: Any) -> Any:
  """The tree that `layers` and `rest` are parts of."""
  by_path = lambda tree: {jax.tree_util.keystr(path): x
                          for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  found = by_path(layers) | by_path(rest)  # counters: those of the rest, which have moved on
  return jax.tree_util.tree_map_with_path(
    lambda path, _: found[jax.tree_util.keystr(path)], like)
