"""Rollouts: the cache against full recomputation, windows, samplers' keys, what is refused."""

import dataclasses
import itertools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_videogpt as golden
from videogpt_jax import cache as cache_lib
from videogpt_jax import model as model_lib
from videogpt_jax import rollout
from videogpt_jax.benchmarks import rollout as benchmark

_CELL = (4, 4, 4)


@pytest.fixture(name="history")
def _history():
  return jax.random.normal(jax.random.key(1), (2, 3, *_CELL))


def _clips(history, model="a", **kwargs):
  config, params = golden.load_model(model)
  arguments = {"num_frames": 3, "clip_frames": 2, "sampler": rollout.Sampler(2),
               "rng": jax.random.key(0), **kwargs}
  return rollout.clips(config, params, history, **arguments)


def _generate(history, **kwargs):
  return jnp.concatenate(list(_clips(history, **kwargs)), axis=1)


def _recomputed(history, lengths, window, sampler, model="a", rng=None):
  """Every clip with everything before it computed anew in every step: no cache, no ring."""
  config, params = golden.load_model(model)
  video, start = history, history.shape[1]
  for index, size in enumerate(lengths):
    kept = min(video.shape[1], window - size) if window else video.shape[1]
    noise = rollout.draw_noise(jax.random.key(0) if rng is None else rng, index,
                               (history.shape[0], size, *history.shape[2:]))
    past = video[:, video.shape[1] - kept:]
    clip = benchmark.recomputed_clip(config, params, past, noise, sampler)
    video = jnp.concatenate([video, clip], axis=1)
  return video[:, start:]


# Against recomputation --------------------------------------------------------------------


@pytest.mark.parametrize(("model", "lengths", "window", "guidance"), [
  ("a", (2, 2, 2), 0, 1.5), ("a", (2, 2, 2, 2), 6, 1.0), ("a", (3, 3, 1), 5, 2.0),
  ("gqa", (2, 2, 1), 5, 1.5), ("longrope", (1, 1, 1), 4, 1.0), ("a", (2, 1, 3), 5, 1.0)])
def test_equals_full_recomputation(model, lengths, window, guidance):
  """Growing history, a window that moves, a shorter and a longer last clip."""
  config, _ = golden.load_model(model)
  history = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, config.channels))
  sampler = rollout.Sampler(3, guidance, shift=2.0)
  ours = _generate(history, model=model, clip_frames=lengths, num_frames=None, sampler=sampler,
                   window=rollout.Window(window))
  golden.assert_close(ours, _recomputed(history, lengths, window, sampler, model))


def test_rolling_equals_recomputation_until_frames_leave(history):
  sampler = rollout.Sampler(2, 1.5)
  rolling = _generate(history, num_frames=8, sampler=sampler, window=rollout.Window(7, "rolling"))
  recomputed = _recomputed(history, (2,) * 4, 7, sampler)
  golden.assert_close(rolling[:, :4], recomputed[:, :4])
  assert np.abs(rolling[:, 4:] - recomputed[:, 4:]).max() > 1e-3  # then they do differ


def test_rolling_keeps_what_frames_saw_when_they_entered(history):
  """Against the dense model on the video whole: a kept frame saw what was there when it came."""
  config, params = golden.load_model("a")
  window, sampler = 5, rollout.Sampler(2)
  ours = _generate(history, num_frames=8, sampler=sampler, window=rollout.Window(window, "rolling"))
  video = jnp.concatenate([history, ours], axis=1)
  # One frame after the other into a large cache, from which everything that left is hidden.
  cache, done = rollout.encode(config, params, video[:, :3], 32), 3
  for index, start in enumerate(range(3, 11, 2)):
    cache = cache_lib.drop(cache, max(0, int(cache.count) - (window - 2)))
    noise = rollout.draw_noise(jax.random.key(0), index, (2, 2, *_CELL))
    clip = rollout.denoise_clip(config, params, cache, noise, sampler)
    golden.assert_close(clip, video[:, start:start + 2])
    cache = cache_lib.drop(cache, max(0, int(cache.count) + 2 - (window - 2)))
    cache, done = rollout.extend(config, params, cache, video[:, start:start + 2]), done + 2


def _rounded(params):
  """Parameters in the types in which `weights.load` places them."""
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict(
    {name: x.astype(jnp.bfloat16) if model_lib.rounded(name) else x for name, x in flat.items()},
    sep="/")


def test_bfloat16_is_close_to_float32(history):
  """The figure for a real model stands in docs/prediction.md; here two layers of random weights."""
  config, params = golden.load_model("a")
  stack = dataclasses.replace(config.backbone, dtype=jnp.bfloat16)
  half = dataclasses.replace(config, backbone=stack)
  arguments = {"num_frames": 4, "clip_frames": 2, "sampler": rollout.Sampler(4, 1.5),
               "window": rollout.Window(6), "rng": jax.random.key(0)}
  exact = rollout.generate(config, params, history, **arguments)
  rounded = rollout.generate(half, _rounded(params), history,
                             **arguments)
  unrounded = rollout.generate(half, params, history, **arguments)
  assert rounded.dtype == jnp.float32  # the sampler's state
  np.testing.assert_array_equal(rounded, unrounded)  # what the model rounds anyway
  error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05


def test_the_same_clip_a_million_clips_later(history):
  """The ring's counters are all that changes: positions and ranks start with the window."""
  config, params = golden.load_model("a")
  frames = jnp.concatenate([history, history[:, :1]], axis=1)
  noise = jax.random.normal(jax.random.key(2), (2, 2, *_CELL))
  early = rollout.encode(config, params, frames, 4)
  late = cache_lib.empty(config.backbone, 2, 4, 6)
  for _ in range(3):  # in the middle of the ring, after frames that have left
    late = rollout.extend(config, params, late, frames[:, :3] + 1)
    late = cache_lib.drop(late, 3)
  a_million = 2_000_000 + int(late.first)  # frames, two a clip
  late = late.replace(first=jnp.int32(a_million % late.slots))
  late = rollout.extend(config, params, late, frames)
  assert int(late.first) % 4 != int(early.first)
  a, b = (rollout.denoise_clip(config, params, cache, noise, rollout.Sampler(3, 1.5))
          for cache in (early, late))
  golden.assert_close(b, a)


# Windows, noise, length -------------------------------------------------------------------


def test_any_length_and_a_shorter_last_clip(history):
  assert _generate(history, num_frames=5).shape == (2, 5, *_CELL)
  assert _generate(history, num_frames=1, clip_frames=4).shape == (2, 1, *_CELL)
  assert [x.shape[1] for x in _clips(history, num_frames=5)] == [2, 2, 1]


@pytest.mark.parametrize("mode", rollout.MODES)
def test_endless(history, mode):
  window = rollout.Window(6, mode)
  clips = _clips(history, num_frames=None, window=window)
  first = jnp.concatenate(list(itertools.islice(clips, 5)), axis=1)
  assert first.shape[1] == 10
  np.testing.assert_array_equal(first, _generate(history, num_frames=10, window=window))


@pytest.mark.parametrize("mode", rollout.MODES)
def test_frames_that_left_the_window_have_no_influence(history, mode):
  other = history.at[:, 0].add(1.0)
  same = lambda window: np.array_equal(
    *(_generate(x, num_frames=2, window=rollout.Window(window, mode)) for x in (history, other)))
  assert same(4) and not same(5)


@pytest.mark.parametrize("mode", rollout.MODES)
def test_a_history_longer_than_the_window(mode):
  history = jax.random.normal(jax.random.key(3), (1, 9, *_CELL))
  whole, end = (_generate(x, num_frames=4, window=rollout.Window(5, mode))
                for x in (history, history[:, -3:]))
  np.testing.assert_array_equal(whole, end)


def test_one_compilation_however_long(history):
  window = rollout.Window(7, "rolling")
  list(_clips(history, num_frames=8, window=window))
  sizes = [f._cache_size() for f in (rollout.encode, rollout.extend, rollout.denoise_clip)]
  list(_clips(history, num_frames=40, window=window, rng=jax.random.key(5)))
  assert sizes == [f._cache_size() for f in (rollout.encode, rollout.extend, rollout.denoise_clip)]


@pytest.mark.parametrize("mode", rollout.MODES)
@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_rollout_goes_on_bit_by_bit(history, mode, done):
  arguments = {"num_frames": 10, "window": rollout.Window(6, mode, history_noise=0.1)}
  whole = list(_clips(history, **arguments))
  rest = list(_clips(history, finished=[np.asarray(x) for x in whole[:done]], **arguments))
  assert len(rest) == len(whole) - done
  for a, b in zip(whole[done:], rest, strict=True):
    np.testing.assert_array_equal(a, b)


def test_another_seed_gives_another_future(history):
  assert not np.allclose(_generate(history), _generate(history, rng=jax.random.key(1)))


def test_a_sample_does_not_depend_on_how_many_there_are(history):
  arguments = {"num_frames": 4, "window": rollout.Window(0, history_noise=0.2)}
  both, alone = (_generate(x, **arguments) for x in (history, history[:1]))
  np.testing.assert_allclose(both[:1], alone, atol=1e-6)
  twice = _generate(jnp.concatenate([history[:1]] * 2), **arguments)
  assert np.abs(twice[0] - twice[1]).max() > 0.01  # and each has noise of its own


def test_history_noise_is_drawn_once_for_each_generated_clip(history, monkeypatch):
  """(1 - n) x + n eps when it enters; given frames stay as they are."""
  entered = []
  for name in ("encode", "extend"):
    function = getattr(rollout, name)
    at = {"encode": 2, "extend": 3}[name]
    monkeypatch.setattr(rollout, name, lambda *x, f=function, at=at: entered.append(x[at]) or f(*x))
  clips = list(_clips(history, num_frames=8, window=rollout.Window(0, history_noise=0.5)))
  np.testing.assert_array_equal(entered[0], history)
  assert len(entered) == 4
  eps = [(x - 0.5 * clip) / 0.5 for x, clip in zip(entered[1:], clips, strict=False)]
  for noise in eps:
    assert abs(float(noise.mean())) < 0.25 and abs(float(noise.std()) - 1) < 0.2
  assert np.abs(eps[0] - eps[1]).max() > 0.5
  for index, noise in enumerate(eps):  # and it is not what the clip started from
    assert np.abs(noise - rollout.draw_noise(jax.random.key(0), index, noise.shape)).max() > 0.5


def test_redraw_noises_all_history_anew_from_the_second_clip_on(history, monkeypatch):
  """As published."""
  entered = []
  encode = rollout.encode
  monkeypatch.setattr(rollout, "encode", lambda *x: entered.append(x[2]) or encode(*x))
  window = rollout.Window(0, history_noise=0.5, redraw=True)
  clips = list(_clips(history, num_frames=6, window=window))
  whole = jnp.concatenate([history, *clips], axis=1)
  np.testing.assert_array_equal(entered[0], history)
  assert [x.shape[1] for x in entered] == [3, 5, 7]
  eps = [(x - 0.5 * whole[:, :x.shape[1]]) / 0.5 for x in entered[1:]]
  for noise in eps:
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.1
  assert np.abs(eps[1][:, :3] - eps[0][:, :3]).max() > 0.5


# Refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
  ({"clip_frames": 5, "num_frames": 5, "window": rollout.Window(4)},
   "clip of 5 frames does not fit a window of 4"),
  ({"clip_frames": 5, "num_frames": None, "window": rollout.Window(4, "rolling")},
   "clip of 5 frames does not fit a window of 4"),
  ({"num_frames": None}, "without an end .* there must be a window"),
  ({"clip_frames": 0}, "at least 1 frame, got 0"),
  ({"sampler": rollout.Sampler(0)}, "steps must be at least 1, got 0"),
  ({"sampler": rollout.Sampler(2, shift=0.0)}, "shift must be positive"),
  ({"sampler": rollout.Sampler(2, method="leap")}, "method is 'leap'; known: euler, heun"),
  ({"sampler": rollout.Sampler(2, guidance_range=(0.5, 0.2))}, "guidance_range must be"),
  ({"window": rollout.Window(-1)}, "window must be at least 0"),
  ({"window": rollout.Window(6, "sliding")}, "'sliding'; known: recompute, rolling"),
  ({"window": rollout.Window(6, history_noise=1.0)}, r"history_noise must be in \[0, 1\)"),
  ({"window": rollout.Window(6, "rolling", 0.1, redraw=True)}, "only where .* encoded anew"),
])
def test_settings_that_make_no_sense_are_refused_at_once(history, arguments, message):
  with pytest.raises(ValueError, match=message):
    _clips(history, **arguments)


def test_a_cache_refuses_more_frames_than_it_has_slots(history):
  config, params = golden.load_model("a")
  with pytest.raises(ValueError, match="3 frames do not fit a cache of 2"):
    rollout.encode(config, params, history, 2)
