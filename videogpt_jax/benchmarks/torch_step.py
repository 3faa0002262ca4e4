"""A peer of the train step: forward and backward of the same model in PyTorch, by the same weights.

It computes as the published implementation does: the noisy and the clean frames of a video are one
sequence, clip after clip, every token is compared with every other under a dense mask, and all that
the backward pass needs is kept. Attention is torch's own `scaled_dot_product_attention`. Weights
have the published names.

    python -m videogpt_jax.benchmarks.torch_step FOLDER    # as `train_step --peer` starts it

The process reads FOLDER/problem.npz and writes FOLDER/gradients.npz, then makes a step for every
line that it is given and prints its seconds; told "end" it prints what it is, its peak memory and
the rate of a product. It imports no jax, so this is the memory of torch alone.
"""

from collections.abc import Mapping, Sequence
import importlib.metadata
import json
import pathlib
import resource
import sys
import time
from typing import Any

import numpy as np

PROBLEM, GRADIENTS = "problem.npz", "gradients.npz"
WEIGHT = "weight/"  # before the names of weights, in both files
LOSS = "loss"
_TIME_FEATURES = 256


class Step:
  """Loss and gradients of one video.

  Args:
    arrays: of the problem: weights under `WEIGHT` and their published names (`pos_embed`, [P, D],
      as it is added to the patches); `noisy`, `target` [N, C, h, w] and `t` [N] of the frames to
      denoise, `clip` [N]; `clean` [M, C, h, w], all frames but those of the last clip; and the
      numbers `layers`, `heads`, `theta`, `eps`, `markers` (rows of `<diff>`, `<img>`, `</img>`).
  """

  def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
    import torch

    self._torch = torch
    self._weights = {name.removeprefix(WEIGHT): torch.from_numpy(x.copy())
                     for name, x in arrays.items() if name.startswith(WEIGHT)}
    self._position = self._weights.pop("pos_embed")
    for x in self._weights.values():
      x.requires_grad_(True)
    self._noisy, self._clean, self._target, self._t = (
      torch.from_numpy(arrays[name].copy()) for name in ("noisy", "clean", "target", "t"))
    self._layers, self._heads = int(arrays["layers"]), int(arrays["heads"])
    self._eps, self._markers = float(arrays["eps"]), [int(x) for x in arrays["markers"]]
    self._patch = self._weights["x_embedder.proj.weight"].shape[-1]
    patches = (self._noisy.shape[2] // self._patch) * (self._noisy.shape[3] // self._patch)
    self._size = patches + 2  # tokens of a frame
    self._order = order(arrays["clip"].tolist(), len(self._clean))
    visible = torch.from_numpy(visible_tokens(self._order, arrays["clip"].tolist(), patches))
    # To be added to the scores, as there; a boolean one is 2 to 9% slower (torch 2.14, CPU).
    self._mask = torch.zeros(visible.shape).masked_fill(
      ~visible, torch.finfo(torch.float32).min)[None, None]
    self._angles = self._rotary(float(arrays["theta"]))

  def __call__(self) -> Any:
    """The loss, and leaves the gradients in the weights."""
    for x in self._weights.values():
      x.grad = None
    loss = (self._predict() - self._target).square().mean()
    loss.backward()
    return loss.detach()

  def gradients(self) -> dict[str, np.ndarray]:
    """Of the last call, by published name."""
    return {name: x.grad.numpy() for name, x in self._weights.items() if x.grad is not None}

  def _rotary(self, theta: float) -> tuple[Any, Any]:
    torch = self._torch
    size = self._weights["llm.norm.weight"].shape[0] // self._heads
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    position = torch.cat([torch.arange(self._size) + frame * self._size
                          for _, frame in self._order])
    angle = torch.outer(position.double(), frequency)
    angle = torch.cat([angle, angle], dim=-1).float()
    return angle.cos(), angle.sin()

  def _predict(self) -> Any:
    torch, w = self._torch, self._weights
    noisy = self._patches(self._noisy, "x_embedder")
    clean = self._patches(self._clean, "input_x_embedder")
    diff, img, end = (w["llm.embed_tokens.weight"][row][None] for row in self._markers)
    time_tokens = self._time("time_token")
    parts = []
    for is_clean, frame in self._order:
      parts += [img, clean[frame], end] if is_clean else [
        diff, time_tokens[frame][None], noisy[frame]]
    x = torch.cat(parts)[None]
    for i in range(self._layers):
      x = self._layer(x, f"llm.layers.{i}.")
    x = self._rms(x, "llm.norm.weight")[0]
    frames = x.reshape(len(self._order), self._size, -1)
    places = [self._order.index((False, frame)) for frame in range(len(self._noisy))]
    return self._read(frames[places][:, 2:])

  def _patches(self, frames: Any, name: str) -> Any:
    conv = self._torch.nn.functional.conv2d
    x = conv(frames, self._weights[f"{name}.proj.weight"], self._weights[f"{name}.proj.bias"],
             stride=self._patch)
    return x.flatten(2).transpose(1, 2) + self._position

  def _time(self, name: str) -> Any:
    torch, half = self._torch, _TIME_FEATURES // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = self._t[:, None] * frequency
    x = self._linear(torch.cat([angle.cos(), angle.sin()], dim=-1), f"{name}.mlp.0")
    return self._linear(torch.nn.functional.silu(x), f"{name}.mlp.2")

  def _linear(self, x: Any, name: str) -> Any:
    return self._torch.nn.functional.linear(x, self._weights[f"{name}.weight"],
                                            self._weights.get(f"{name}.bias"))

  def _rms(self, x: Any, name: str) -> Any:
    scale = self._torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)
    return self._weights[name] * (x * scale)

  def _layer(self, x: Any, name: str) -> Any:
    functional = self._torch.nn.functional
    qkv = self._linear(self._rms(x, f"{name}input_layernorm.weight"), f"{name}self_attn.qkv_proj")
    q, k, v = (part.reshape(*part.shape[:2], self._heads, -1).transpose(1, 2)
               for part in qkv.chunk(3, dim=-1))
    out = functional.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v,
                                                  attn_mask=self._mask)
    x = x + self._linear(out.transpose(1, 2).flatten(2), f"{name}self_attn.o_proj")
    gate, up = self._linear(self._rms(x, f"{name}post_attention_layernorm.weight"),
                            f"{name}mlp.gate_up_proj").chunk(2, dim=-1)
    return x + self._linear(up * functional.silu(gate), f"{name}mlp.down_proj")

  def _rotate(self, x: Any) -> Any:
    cos, sin = self._angles
    first, second = x.chunk(2, dim=-1)
    return x * cos + self._torch.cat([-second, first], dim=-1) * sin

  def _read(self, x: Any) -> Any:
    functional = self._torch.nn.functional
    modulation = self._linear(functional.silu(self._time("t_embedder")),
                              "final_layer.adaLN_modulation.1")
    shift, scale = modulation[:, None].chunk(2, dim=-1)
    x = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    x = self._linear(x, "final_layer.linear")
    frames, channels, height, width = self._noisy.shape
    p = self._patch
    x = x.reshape(frames, height // p, width // p, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(frames, channels, height, width)


def order(clip: Sequence[int], clean: int) -> list[tuple[bool, int]]:
  """The frames of a sequence as (is clean, frame): of every clip the noisy, then the clean ones.

  Args:
    clip: of every frame.
    clean: frames that have a clean copy, the first ones.
  """
  found = []
  for k in range(max(clip) + 1):
    frames = [frame for frame, other in enumerate(clip) if other == k]
    found += [(False, frame) for frame in frames]
    found += [(True, frame) for frame in frames if frame < clean]
  return found


def visible_tokens(frames: Sequence[tuple[bool, int]], clip: Sequence[int], patches: int
                   ) -> np.ndarray:
  """The dense mask [L, L], true where the row's token sees the column's."""
  S = patches + 2
  is_clean, frame, own = (np.repeat(x, S) for x in (
    [x for x, _ in frames], [x for _, x in frames], [clip[x] for _, x in frames]))
  noisy_steps, clean_steps = np.full(S, 2), np.full(S, 1)
  noisy_steps[:2], clean_steps[[0, -1]] = (0, 1), (0, 2)
  step = np.concatenate([clean_steps if x else noisy_steps for x, _ in frames])
  q, k = np.s_[:, None], np.s_[None, :]
  in_order = step[q] >= step[k]
  noisy = np.where(is_clean[k], own[k] < own[q], (own[k] == own[q]) & in_order)
  clean = is_clean[k] & ((frame[k] < frame[q]) | ((frame[k] == frame[q]) & in_order))
  return np.where(is_clean[q], clean, noisy)


def main(folder: pathlib.Path) -> None:
  """Makes steps as it is told on the standard input; see the module."""
  with np.load(folder / PROBLEM) as file:
    arrays = dict(file)
  step = Step(arrays)
  del arrays
  loss = step()
  found: dict[str, Any] = {WEIGHT + name: x for name, x in step.gradients().items()}
  np.savez(folder / GRADIENTS, **found, **{LOSS: loss.numpy()})
  print("ready", flush=True)
  for line in sys.stdin:
    if line.strip() == "end":
      break
    began = time.perf_counter()
    step()
    print(time.perf_counter() - began, flush=True)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before the products
  print(json.dumps({"version": importlib.metadata.version("torch"), "peak_rss_mib": peak,
                    "product_gflops_per_s": product_rate() / 1e9}), flush=True)


def product_rate(size: int = 2048, repeats: int = 3) -> float:
  """FLOP/s of a float32 product of square matrices, measured as `machine.product_rate` does."""
  import torch

  a, b = torch.randn(2, size, size)
  a @ b
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - began)
  return 2 * size**3 / min(seconds)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
