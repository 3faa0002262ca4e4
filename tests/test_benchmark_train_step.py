"""PyTorch beside the train step: the peer computes what the published implementation does."""

import dataclasses
import importlib.util

import numpy as np
import pytest

import golden_videogpt as golden
from videogpt_jax import model
from videogpt_jax import published
from videogpt_jax.benchmarks import step_peer
from videogpt_jax.benchmarks import torch_step
from videogpt_jax.benchmarks import train_step
from videogpt_jax.benchmarks import train_step_cases
from videogpt_jax.errors import InputError

_ONE_ROW = [spec for spec in golden.index("forward_train_index")
            if spec["model"] == "a" and len(spec["frame_blocks"]) == 1]
_needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None,
                                  reason="torch is not installed, see the extra [bench]")


def _clip(lengths):
  return np.repeat(np.arange(len(lengths)), lengths)


@pytest.mark.parametrize("spec", golden.index("masks_index")["train"], ids=lambda spec: spec["key"])
def test_peer_lays_out_and_masks_a_sequence_as_published(spec):
  case = golden.case("masks_train", spec["key"])
  clip = _clip(spec["frame_blocks"])
  order = torch_step.order(clip.tolist(), len(clip) - spec["frame_blocks"][-1])
  size = int(case["patches"]) + 2
  np.testing.assert_array_equal(np.repeat([frame for _, frame in order], size),
                                case["token_frame"][0])
  np.testing.assert_array_equal(np.repeat([is_clean for is_clean, _ in order], size),
                                case["token_kind"][0] >= 4)
  np.testing.assert_array_equal(
    torch_step.visible_tokens(order, clip.tolist(), int(case["patches"])),
    case["attention_mask"][0])


@_needs_torch
@pytest.mark.parametrize("spec", _ONE_ROW, ids=lambda spec: spec["case"])
def test_peer_finds_the_published_loss_and_gradients(spec):
  case = golden.case("forward_train_a", spec["case"])
  config, params = golden.load_model("a")
  stack = config.backbone
  mix = lambda x1, x0, t: (t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0)
  rows, columns = (side // config.patch_size for side in case["x1"].shape[2:])
  weights = published.to_published(params, config) | {"pos_embed": model.position_table(
    stack.hidden_size, config.pos_embed_max_size, rows, columns)}
  step = torch_step.Step({
    **{torch_step.WEIGHT + name: np.asarray(x) for name, x in weights.items()},
    "noisy": mix(case["x1"], case["x0"], case["t"]), "target": case["x1"], "t": case["t"],
    "clean": mix(case["clean"], case["input_x0"], case["input_t"]),
    "clip": _clip(spec["frame_blocks"][0]), "layers": stack.num_layers, "heads": stack.num_heads,
    "theta": stack.rope_theta, "eps": stack.rms_norm_eps,
    "markers": [config.diff_id, config.img_id, config.end_img_id]})
  golden.assert_close(step(), case["loss"])
  found = step.gradients()
  names = [name.removeprefix("grad/") for name in case if name.startswith("grad/")]
  assert names
  for name in names:
    golden.assert_close(found[name], case[f"grad/{name}"])


def test_a_peer_that_computes_something_else_is_refused():
  ours = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
  theirs = {torch_step.WEIGHT + name: x.copy() for name, x in ours.items()}
  same = {torch_step.LOSS: np.float32(2), **theirs}
  assert step_peer.difference(2.0, ours, same) == 0
  for change in ({torch_step.LOSS: np.float32(2.01)}, {torch_step.LOSS: np.float32(np.nan)},
                 {torch_step.WEIGHT + "b": np.float32([1, 1.01])},
                 {torch_step.WEIGHT + "b": np.float32([1, np.nan])}):
    with pytest.raises(InputError, match=r"something else: \S+ is off"):
      step_peer.difference(2.0, ours, same | change)


def test_what_a_peer_cannot_do_is_refused_before_anything_is_computed(monkeypatch):
  monkeypatch.setattr(train_step.sharding, "make_mesh", lambda sizes: pytest.fail("began"))
  laptop = train_step_cases.of("laptop8")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install -e '\.\[bench\]'"):
    train_step.measure(laptop, 1, beside_torch=True)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  with pytest.raises(InputError, match=r"--peer: .* whole train step"):
    train_step.measure(dataclasses.replace(laptop, update=True), 1, beside_torch=True)
