"""The model, its loss, gradients and sampler against the published implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_videogpt as golden
from videogpt_jax import flow
from videogpt_jax import layout
from videogpt_jax import model
from videogpt_jax import published
from videogpt_jax import rollout

_TRAINING = [c for c in golden.index("forward_train_index") if c["model"] in ("a", "gqa")]
_SAMPLER = [c for c in golden.index("sampler_index") if c["model"] in ("a", "gqa")]


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


@pytest.mark.parametrize("spec", _SAMPLER, ids=lambda c: c["case"])
def test_golden_sampler(spec):
  case = golden.case("sampler", spec["case"])
  config, params = golden.load_model(spec["model"])
  sampler = rollout.Sampler(spec["steps"], spec["cfg"], spec["shift"])
  golden.assert_close(flow.time_grid(spec["steps"], spec["shift"]), case["sigma"])
  video = golden.channels_last(case["history"])[None]
  for r, count in enumerate(spec["gen"]):
    kept = rollout.kept_history(video.shape[1], count, spec.get("max_frame_window", 0))
    assert kept == case[f"round{r}/kept_history"]
    noise = golden.channels_last(case[f"round{r}/noise"])[None]
    clip = rollout.denoise_clip(config, params, video[:, video.shape[1] - kept:], noise, sampler)
    golden.assert_close(clip[0], golden.channels_last(case[f"round{r}/latents"]))
    video = np.concatenate([video, clip], axis=1)


def _with_attention(config, implementation):
  import dataclasses
  backbone = dataclasses.replace(config.backbone, attention=implementation)
  return dataclasses.replace(config, backbone=backbone)
