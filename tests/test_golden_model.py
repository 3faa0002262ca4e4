"""The model, its loss, gradients and sampler against the published implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import golden_videogpt as golden
from videogpt_jax import backbone
from videogpt_jax import flow
from videogpt_jax import layout
from videogpt_jax import model
from videogpt_jax import optimizer as optimizer_lib
from videogpt_jax import published
from videogpt_jax import rollout
from videogpt_jax import sampler as sampler_lib

_TRAINING = golden.index("forward_train_index")
_SAMPLER = golden.index("sampler_index")


def _batch(case, frame_blocks):
  """A case as our arrays: clip, valid [B, N], and a `flow.Draw` of padded frames."""
  frames = max(map(sum, frame_blocks))
  shape = (len(frame_blocks), frames, *golden.channels_last(case["x1"]).shape[1:])
  clip, valid = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
  full = {name: np.zeros(shape, np.float32) for name in ("x1", "x0", "clean", "input_x0")}
  times = {name: np.zeros(shape[:2], np.float32) for name in ("t", "input_t")}
  for b, (lengths, noisy, clean) in enumerate(golden.samples(case, frame_blocks)):
    n, m = noisy.stop - noisy.start, clean.stop - clean.start
    clip[b, :n] = layout.fixed_partition(tuple(lengths))
    valid[b, :n] = True
    for name in ("x1", "x0"):
      full[name][b, :n] = golden.channels_last(case[name][noisy])
    for name in ("clean", "input_x0"):
      full[name][b, :m] = golden.channels_last(case[name][clean])
    times["t"][b, :n], times["input_t"][b, :m] = case["t"][noisy], case["input_t"][clean]
  mix = lambda x1, x0, t: flow.interpolate(full[x1], full[x0], times[t])
  draw = flow.Draw(target=full["x1"], noisy=mix("x1", "x0", "t"), t=times["t"], clip=clip,
                   clean=mix("clean", "input_x0", "input_t")[:, :-1],
                   clean_t=times["input_t"][:, :-1])
  return clip, valid, draw


@pytest.mark.parametrize("spec", _TRAINING, ids=lambda c: f"{c['model']}-{c['case']}")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_golden_training_forward_and_gradients(spec, implementation):
  case = golden.case(f"forward_train_{spec['model']}", spec["case"])
  config, params = golden.load_model(spec["model"])
  config = _with_attention(config, implementation)
  clip, valid, draw = _batch(case, spec["frame_blocks"])

  @jax.jit
  def run(params):
    def loss(params):
      blocks = layout.training(jnp.asarray(clip), jnp.asarray(valid))
      out = model.VideoGPT(config).apply({"params": params}, draw.clean, draw.noisy, draw.t, blocks)
      value, aux = flow.loss(out.x1, draw, valid)
      return value, (out.x1, aux)
    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, (x1, aux)), grads = run(params)
  golden.assert_close(np.asarray(x1)[valid], golden.channels_last(case["pred"]))
  golden.assert_close(np.asarray(aux["frame_loss"])[valid], case["loss_per_frame"])
  golden.assert_close(loss, case["loss"])
  tensors = published.to_published(grads, config)
  names = [name.removeprefix("grad/") for name in case if name.startswith("grad/")]
  assert names
  for name in names:
    golden.assert_close(tensors[name], case[f"grad/{name}"])


@pytest.mark.parametrize("mode", rollout.MODES)
@pytest.mark.parametrize("spec", _SAMPLER, ids=lambda c: c["case"])
def test_golden_sampler(spec, mode, monkeypatch):
  """The engine with the published noise; `rolling` equals it until the first frames leave."""
  case = golden.case("sampler", spec["case"])
  config, params = golden.load_model(spec["model"])
  sampler = rollout.Sampler(spec["steps"], spec["cfg"], spec["shift"])
  golden.assert_close(sampler_lib.time_grid(spec["steps"], spec["shift"]), case["sigma"])
  noise = lambda index: golden.channels_last(case[f"round{index}/noise"])[None]
  monkeypatch.setattr(rollout, "draw_noise", lambda rng, index, shape: noise(index))
  history, frames = golden.channels_last(case["history"])[None], spec["gen"]
  window = rollout.Window(spec.get("max_frame_window", 0), mode)
  clips = rollout.clips(config, params, history, clip_frames=frames, sampler=sampler, window=window,
                        rng=None)
  seen = history.shape[1]
  for r, (count, clip) in enumerate(zip(frames, clips, strict=True)):
    assert clip.shape[1] == count
    kept = int(case[f"round{r}/kept_history"])
    assert rollout.kept_history(seen, count, window.frames) == kept
    if mode == "rolling" and r and kept < seen:
      return
    golden.assert_close(clip[0], golden.channels_last(case[f"round{r}/latents"]))
    seen += count


def test_golden_three_steps_of_adamw():
  """The optimizer of training, on the gradients of training."""
  spec, case = golden.index("adamw_index"), golden.arrays("adamw")
  config, params = golden.load_model(spec["model"])
  clip, valid, draw = _batch(case, spec["frame_blocks"])
  optimizer = optimizer_lib.make(optimizer_lib.Config(
      learning_rate=spec["lr"], warmup_steps=0, total_steps=spec["steps"], b1=spec["betas"][0],
      b2=spec["betas"][1], eps=spec["eps"], weight_decay=spec["weight_decay"],
      clip_norm=spec["max_grad_norm"]))

  def loss(params):
    blocks = layout.training(jnp.asarray(clip), jnp.asarray(valid))
    x1 = model.predict(config, params, draw.clean, draw.noisy, draw.t, blocks)
    return flow.loss(x1, draw, valid)[0]

  @jax.jit
  def update(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)

  state = optimizer.init(params)
  for before, norm in zip(spec["losses"], spec["grad_norms"], strict=False):
    params, state, value, grad_norm = update(params, state)
    golden.assert_close(value, before)
    golden.assert_close(grad_norm, norm)
  golden.assert_close(jax.jit(loss)(params), spec["losses"][-1])
  tensors = published.to_published(params, config)
  finals = [name.removeprefix("final/") for name in case if name.startswith("final/")]
  assert finals
  for name in finals:
    golden.assert_close(tensors[name], case[f"final/{name}"], tolerance=1e-3)


def test_golden_position_table():
  """Crops of the real model's table, and sums over all of it."""
  parts = golden.arrays("parts")
  names = sorted({k.split("/")[0] for k in parts if k.startswith("pos_embed")})
  assert names
  for name in names:
    dim, (h, w) = int(parts[f"{name}/dim"]), parts[f"{name}/latent_hw"]
    golden.assert_close(model.position_table(dim, 192, h // 2, w // 2), parts[f"{name}/crop"])
    whole = model.position_table(dim, 192, 192, 192).astype(np.float64)
    golden.assert_close(whole.sum(), parts[f"{name}/table_sum"])
    golden.assert_close(whole[:8].sum(-1), parts[f"{name}/table_row_sum_first8"])


def test_golden_rotary_angles():
  parts = golden.arrays("parts")
  names = sorted({k.split("/")[0] for k in parts if k.startswith("rope")})
  assert names
  for name in names:
    size, theta = int(parts[f"{name}/head_dim"]), float(parts[f"{name}/theta"])
    config = backbone.Config(hidden_size=size, intermediate_size=1, num_layers=1, num_heads=1,
                             num_kv_heads=1, rope_theta=theta)
    angles = backbone.rotary_angles(config, jnp.asarray(parts[f"{name}/positions"]))
    for ours, theirs in zip(angles, ("cos", "sin"), strict=True):
      both_halves = np.concatenate([ours, ours], axis=-1)
      np.testing.assert_allclose(both_halves, parts[f"{name}/{theirs}"], rtol=0, atol=1e-3)


def _with_attention(config, implementation):
  import dataclasses
  backbone = dataclasses.replace(config.backbone, attention=implementation)
  return dataclasses.replace(config, backbone=backbone)
