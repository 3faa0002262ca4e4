"""Adapters: against the merged model, and as a run that starts, stops, goes on and is exported."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_run
from videogpt_jax import checkpoint
from videogpt_jax import checkpoint_files
from videogpt_jax import config as config_lib
from videogpt_jax import convert
from videogpt_jax import flops
from videogpt_jax import layout
from videogpt_jax import lora
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import presets
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import train
from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import loss as loss_lib

MATRICES = {"attention": ("q", "kv", "o"), "mlp": ("gate_up", "down")}
RANK, ALPHA = 3, 6.0


def _assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _tuning(c, base):
  """The settings `c`, with adapters of the weights in the folder `base`."""
  c.checkpoint.init_from = str(base)
  c.lora.rank, c.lora.alpha = RANK, ALPHA
  c.optimizer.learning_rate = 1e-2
  c.train.steps = 6
  c.log.videos = 0
  return c


# The model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tiny_data):
  """A recipe with adapters; a base and adapters, all random; rows of stored latents."""
  c = _tuning(tiny_run.config(tiny_data), "somewhere")
  recipe = config_lib.recipe(c)
  params = nn.meta.unbox(model.init_params(recipe.model, 0))
  rng = np.random.default_rng(0)
  noise = lambda x: x + jnp.float32(0.1 * rng.normal(size=x.shape))
  base, adapters = lora.split(jax.tree.map(noise, params))
  stored = jnp.uint8(rng.integers(0, 256, size=(2, 4, 4, 4, recipe.codec.channels)))
  return recipe, base, adapters, stored


def _plain(recipe):
  stack = dataclasses.replace(recipe.model.backbone, lora=None)
  return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=stack))


def _merged(base, adapters):
  """The matrices W + alpha / r A B, in float64 by numpy."""
  params = traverse_util.flatten_dict(base)
  flat = traverse_util.flatten_dict(adapters)
  for part, names in MATRICES.items():
    for name in names:
      path = ("backbone", "layers", part, name)
      a, b = (np.float64(flat[(*path[:-1], name + end)]) for end in (lora.A, lora.B))
      product = a.reshape(len(a), -1, RANK) @ b.reshape(len(b), RANK, -1)
      w = np.float64(params[path])
      params[path] = jnp.float32(w + ALPHA / RANK * product.reshape(w.shape))
  return traverse_util.unflatten_dict(params)


def _predict(recipe, params):
  rng = np.random.default_rng(1)
  latents = lambda count: jnp.float32(rng.normal(size=(2, count, 4, 4, recipe.codec.channels)))
  return model.predict(recipe.model, params, latents(3), latents(2), jnp.full((2, 2), 0.4),
                       layout.prediction(3, 2, 2))


def test_fresh_adapters_change_nothing(adapted):
  recipe, base, *_ = adapted
  fresh = lora.split(nn.meta.unbox(model.init_params(recipe.model, 5)))[1]
  for path, x in traverse_util.flatten_dict(fresh).items():
    assert np.any(x) == path[-1].endswith(lora.A)
  ours, theirs = _predict(recipe, lora.join(base, fresh)), _predict(_plain(recipe), base)
  assert np.abs(theirs).max() > 0.1
  np.testing.assert_array_equal(ours, theirs)


def test_adapters_predict_what_the_merged_matrices_predict(adapted):
  recipe, base, adapters, _ = adapted
  ours = _predict(recipe, lora.join(base, adapters))
  theirs = _predict(_plain(recipe), _merged(base, adapters))
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  assert np.abs(ours - _predict(_plain(recipe), base)).max() > 0.01


def test_gradients_are_those_through_the_merged_matrices(adapted):
  """dA = s G B^T and dB = s A^T G, for the gradient G of the merged matrix."""
  recipe, base, adapters, stored = adapted
  keys = objective.row_keys(0, jnp.int32(0), 2)
  ours, metrics = step_lib.gradients(recipe, adapters, keys, stored, base)
  assert jax.tree.structure(ours) == jax.tree.structure(adapters)
  whole, told = step_lib.gradients(_plain(recipe), _merged(base, adapters), keys, stored)
  np.testing.assert_allclose(metrics["loss_sum"], told["loss_sum"], rtol=1e-5)
  scale = ALPHA / RANK
  for part, names in MATRICES.items():
    for name in names:
      of = lambda tree, end="", part=part, name=name: np.float64(
        tree["backbone"]["layers"][part][name + end])
      a, b = of(adapters, lora.A), of(adapters, lora.B)
      a, b = a.reshape(len(a), -1, RANK), b.reshape(len(b), RANK, -1)
      g = of(whole).reshape(len(a), a.shape[1], b.shape[2])
      for end, expected in ((lora.A, scale * g @ b.swapaxes(1, 2)),
                            (lora.B, scale * a.swapaxes(1, 2) @ g)):
        found = of(ours, end)
        assert np.abs(found).max() > 1e-6
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-3,
                                   atol=1e-4 * np.abs(expected).max())


def test_only_targets_have_adapters(tiny):
  c = _tuning(tiny, "somewhere")
  c.lora.targets = ("q", "down")
  names = {path[-1] for path in traverse_util.flatten_dict(
    lora.split(model.abstract_params(config_lib.adapted(c)))[1])}
  assert names == {"q_lora_a", "q_lora_b", "down_lora_a", "down_lora_b"}


def test_the_base_is_kept_in_its_type_and_counts_in_no_moment(tiny):
  """What the model rounds to its compute type in bfloat16, the rest and the adapters float32."""
  c = _tuning(tiny, "somewhere")
  c.lora.base_dtype = "bfloat16"
  recipe, mesh = config_lib.recipe(c), sharding.make_mesh(c.mesh)
  state = step_lib.create_state(recipe, mesh)
  for name, x in traverse_util.flatten_dict(state.base, sep="/").items():
    assert x.dtype == (jnp.bfloat16 if model.rounded(name) else jnp.float32), name
  trained = traverse_util.flatten_dict(state.params)
  assert all(x.dtype == jnp.float32 for x in trained.values())
  size = sum(x.size for x in trained.values())
  assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * size + 2  # and two counts
  told = flops.parameters(recipe.model)
  assert told["adapters"] == size
  assert told["total"] - size == sum(x.size for x in jax.tree.leaves(state.base))


@pytest.mark.parametrize(("name", "value", "message"), [
  ("lora.rank", -1, "config.lora.rank must be at least 0, got -1"),
  ("lora.alpha", 0.0, "config.lora.alpha must be positive"),
  ("lora.targets", ("q", "v"), r"must be some of q, kv, o, gate_up, down; got \('q', 'v'\)"),
  ("lora.targets", (), "must be some of q, kv"),
  ("lora.base_dtype", "int8", "config.lora.base_dtype is 'int8'"),
  ("checkpoint.init_from", "", "adapters need the weights they belong to"),
  ("optimizer.name", "muon", "use 'adamw' or 'adafactor'"),
])
def test_settings_that_make_no_sense(tiny, name, value, message):
  c = _tuning(tiny, "somewhere")
  section, leaf = name.split(".")
  c[section][leaf] = value
  with pytest.raises(InputError, match=message):
    config_lib.validate(c)


# A run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_data, finished):
  """The workdir of a run of adapters, beside the base that it was given."""
  workdir = tmp_path_factory.mktemp("tuned")
  shutil.copytree(finished.workdir, workdir / "base")
  train.train(_tuning(tiny_run.config(tiny_data), workdir / "base"), str(workdir / "run"))
  return workdir / "run"


def _copied(tuned, folder):
  """A copy of the run and its base that a test may spoil."""
  shutil.copytree(tuned.parent, folder, dirs_exist_ok=True)
  return folder / "run", folder / "base"


def test_a_checkpoint_holds_adapters_alone(tuned):
  saved = checkpoint_files.saved_tree(checkpoint_files.find(tuned))
  assert set(saved) == {"step", "params", "ema", "opt_state", "bad_steps", "skipped",
                        "typical_norm"}
  for name in ("params", "ema"):
    paths = traverse_util.flatten_dict(saved[name])
    assert len(paths) == 10
    assert all(path[-1].endswith((lora.A, lora.B)) for path in paths)
  sizes = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
  assert sizes(saved) < 5 * sizes(saved["params"])
  record = checkpoint_files.read_extra(checkpoint_files.find(tuned))["base"]
  assert record["path"] == str(tuned.parent / "base")
  assert set(record["checksums"]) == set(checkpoint_files.open_params(tuned.parent / "base").leaves)


def test_steps_change_the_adapters_and_not_the_base(tiny, finished, tmp_path):
  c = _tuning(tiny, finished.workdir)
  recipe, mesh = config_lib.recipe(c), sharding.make_mesh(c.mesh)
  source, _ = train.open_data(c)
  opened = checkpoint.Checkpoints(tmp_path, keep=1, save_every=1)
  state = train.find_state(c, recipe, mesh, opened, source.fingerprint, train.open_base(c))
  opened.close()
  given = checkpoint_files.load_params(finished.workdir)[0]
  _assert_equal(jax.device_get(state.base), given)
  first = jax.device_get(state.params)
  stored = np.random.default_rng(0).integers(0, 256, size=(8, 4, 4, 4, recipe.codec.channels))
  with sharding.use(mesh):
    run = step_lib.compile_step(recipe, mesh)
    for _ in range(3):
      state, metrics = run(state, jnp.uint8(stored))
  assert not int(metrics["skipped"])
  _assert_equal(jax.device_get(state.base), given)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), first, jax.device_get(state.params))
  assert all(jax.tree.leaves(moved))


def test_resumed_it_is_the_same_bit_for_bit(tuned, tiny, tmp_path):
  c = _tuning(tiny, tuned.parent / "base")
  for steps in (3, 6):
    c.train.steps = steps
    train.train(c, str(tmp_path))
  tiny_run.assert_same_state(tmp_path, tuned)
  again = checkpoint_files.read_extra(checkpoint_files.find(tmp_path))["base"]
  assert again == checkpoint_files.read_extra(checkpoint_files.find(tuned))["base"]


def test_another_base_is_refused(tuned, tiny, tmp_path, finished):
  """On resume and to predict; whether it is gone, or trained further, or of another model."""
  run, base = _copied(tuned, tmp_path)
  c = _tuning(tiny, base)
  c.train.steps = 12
  shutil.rmtree(base)
  shutil.rmtree(tmp_path / "kept", ignore_errors=True)
  (tuned.parent / "base").rename(tuned.parent / "aside")  # the path that the run remembers
  try:
    with pytest.raises(InputError, match=r"adapters of the weights .*base, which are no longer"):
      weights_lib.load(str(run))
    with pytest.raises(InputError, match="no weights at"):
      train.train(c, str(run))
  finally:
    (tuned.parent / "aside").rename(tuned.parent / "base")

  other = tiny_run.config(tiny.data.path)
  other.train.steps, other.log.videos = 3, 0
  other.checkpoint.init_from = str(finished.workdir)
  train.train(other, str(base))
  with pytest.raises(InputError, match=r"not those that the adapters of .*run belong to: .*config"):
    train.train(c, str(run))
  shutil.move(tuned.parent / "base", tuned.parent / "aside")
  shutil.copytree(base, tuned.parent / "base")
  try:
    with pytest.raises(InputError, match=r"not those that the adapters of .*run belong to"):
      weights_lib.load(str(tuned))
  finally:
    shutil.rmtree(tuned.parent / "base")
    shutil.move(tuned.parent / "aside", tuned.parent / "base")
  assert weights_lib.load(str(tuned)).params


def test_another_rank_or_a_run_without_adapters_is_not_resumed(tuned, tiny, finished):
  c = _tuning(tiny, tuned.parent / "base")
  c.train.steps = 12
  c.lora.rank = 4
  with pytest.raises(InputError, match=r"config\.lora\.rank is 4, in the checkpoint 3"):
    train.train(c, str(tuned))
  c.lora.rank = 3
  c.train.steps = 36
  with pytest.raises(InputError, match=r"config\.lora\.rank is 3, in the checkpoint 0"):
    train.train(c, str(finished.workdir))


def test_another_model_as_base_is_refused(tiny, finished, tmp_path):
  c = _tuning(tiny, finished.workdir)
  c.model.intermediate_size = 48
  with pytest.raises(InputError, match="holds another model"):
    train.train(c, str(tmp_path))


def test_exported_it_is_the_merged_model(tuned, tmp_path):
  """Under the published names, and from them again; it predicts as the run does."""
  convert.export_folder(str(tuned), str(tmp_path / "out"))
  exported, run = weights_lib.load(str(tmp_path / "out")), weights_lib.load(str(tuned))
  _assert_equal(exported.params, run.params)
  base = checkpoint_files.load_params(tuned.parent / "base")[0]
  adapters = checkpoint_files.load_params(tuned)[0]
  expected = _merged(base, adapters)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
               exported.params, expected)
  assert np.abs(exported.params["backbone"]["layers"]["mlp"]["down"]
                - base["backbone"]["layers"]["mlp"]["down"]).max() > 1e-3
  history = np.zeros((1, 2, 16, 16, 3), np.uint8)
  future = lambda w: w.continue_video(history, 2, rng=jax.random.key(0))
  np.testing.assert_array_equal(future(exported), future(run))


def test_the_held_out_loss_is_that_of_the_merged_model(tuned, tiny):
  c = _tuning(tiny, tuned.parent / "base")
  told = telemetry.read_metrics(tuned / telemetry.METRICS_FILE)[-1]
  loss = loss_lib.held_out_loss(c, [str(tuned)])[str(tuned)]["loss"]
  assert loss == pytest.approx(told["validation/loss"], rel=1e-5)


def test_adapters_of_adapters(tuned, tiny, tmp_path):
  """A run of adapters is a base like any other, its own adapters merged."""
  c = _tuning(tiny, tuned)
  c.train.steps = 3
  train.train(c, str(tmp_path))
  record = checkpoint_files.read_extra(checkpoint_files.find(tmp_path))["base"]
  first = checkpoint_files.read_extra(checkpoint_files.find(tuned))["base"]
  differ = {name.split("/")[-1] for name, x in record["checksums"].items()
            if x != first["checksums"][name]}
  assert differ == set(lora.TARGETS)
  assert weights_lib.load(str(tmp_path)).params


# Devices ----------------------------------------------------------------------------------

_EIGHT = """
import json
import os
import sys
import jax
import numpy as np
import tiny_run
from videogpt_jax import checkpoint, config, sharding, step, train

settings, data, workdir, out = sys.argv[1:]
assert jax.device_count() == (8 if "fsdp" in settings else 1)
c = tiny_run.config(data)
for name, value in json.loads(settings).items():
  section, leaf = name.split(".")
  c[section][leaf] = value
recipe, mesh = config.recipe(c), sharding.make_mesh(c.mesh)
source, _ = train.open_data(c)
checkpoints = checkpoint.Checkpoints(workdir, keep=2, save_every=1)
state = train.find_state(c, recipe, mesh, checkpoints, source.fingerprint, train.open_base(c))
stored = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 4, 48)).astype(np.uint8)
norms = []
with sharding.use(mesh):
  run = step.compile_step(recipe, mesh)
  for _ in range(3):
    state, metrics = run(state, jax.device_put(stored, sharding.rows(mesh)))
    norms.append((float(metrics["loss_sum"]), float(metrics["grad_norm"])))
split = [x for x in jax.tree.leaves((state.params, state.opt_state, state.base))
         if not x.sharding.is_fully_replicated]
checkpoints.close()
np.savez(out, norms=norms, split=len(split), **{
  jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)})
"""


@pytest.mark.parametrize("settings", [
  pytest.param({"lora.rank": 4, "optimizer.eps": 1e-3}, id="adapters"),
  pytest.param({"optimizer.name": "adafactor", "train.ema_decay": 0.0, "model.hidden_size": 64,
                "model.intermediate_size": 96}, id="adafactor"),
])
def test_eight_devices_compute_what_one_does(settings, tiny_data, finished, tmp_path):
  """Batch, parameters and heads split; matrices, adapters and factored moments with them."""
  found = {}
  if "lora.rank" in settings:
    settings = {**settings, "checkpoint.init_from": str(finished.workdir)}
  for devices, mesh in ((1, {}), (8, {"mesh.fsdp": 2, "mesh.tensor": 2})):
    out = tmp_path / f"{devices}.npz"
    result = subprocess.run(
      [sys.executable, "-c", _EIGHT, json.dumps({**settings, **mesh}), str(tiny_data),
       str(tmp_path / str(devices)), str(out)], capture_output=True, text=True, timeout=300,
      check=False, env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent),
           "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
                        f"--xla_force_host_platform_device_count={devices}"})
    assert result.returncode == 0, result.stderr
    found[devices] = dict(np.load(out))
  assert not found[1].pop("split")
  assert found[8].pop("split") > 10
  for name, x in found[1].items():
    np.testing.assert_allclose(found[8][name], x, rtol=1e-4, atol=1e-5, err_msg=name)


# The run cards ----------------------------------------------------------------------------

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("card", ["finetune_lora", "finetune_full"])
def test_a_small_run_card_lowers_the_held_out_loss(card, tmp_path):
  """By its commands, on a few videos: encode, main, and for adapters predict and convert."""
  data, workdir = tmp_path / "data", tmp_path / "run"
  config = [f"--config={_CONFIGS / card}.py:small", f"--config.data.path={data}",
            "--config.data.train_videos=32", "--config.data.validation_videos=8"]
  training = [*config, "--config.data.frames=8", "--config.sample.clip_frames=4",
              "--config.train.batch_size=2", "--config.train.steps=16", "--config.log.videos=0",
              "--config.log.validation_batches=4", "--config.optimizer.warmup_steps=2"]
  for command, arguments in (
      ("encode", config), ("main", [*training, f"--workdir={workdir}"]),
      ("evaluate", ["--benchmark=loss", *training, f"--out={tmp_path / 'losses'}",
                    f"--checkpoint={weights_lib.PRETRAINED},{workdir}"])):
    result = tiny_run.run(command, *arguments)
    assert result.returncode == 0, result.stderr
  losses = json.loads((tmp_path / "losses" / "loss.json").read_text())["held_out"]
  before, after = losses[weights_lib.PRETRAINED]["loss"], losses[str(workdir)]["loss"]
  assert after < 0.97 * before
  if card == "finetune_lora":
    result = tiny_run.run("convert", f"--checkpoint={workdir}", f"--out={tmp_path / 'folder'}")
    assert result.returncode == 0, result.stderr
    for path in (workdir, tmp_path / "folder"):
      result = tiny_run.run("predict", f"--checkpoint={path}", f"--out={tmp_path / path.name}_out",
                            "--steps=2")
      assert result.returncode == 0, result.stderr
    told = [json.loads((tmp_path / f"{name}_out" / "prediction.json").read_text())
            for name in ("run", "folder")]
    assert told[0]["parameters"] == told[1]["parameters"]


@pytest.mark.parametrize("card", ["finetune_lora", "finetune_full"])
def test_the_run_cards_of_the_published_model(card):
  module = {}
  exec(compile((_CONFIGS / f"{card}.py").read_text(), card, "exec"), module)
  c = module["get_config"]()
  config_lib.validate(c)
  paper = presets.paper()
  paper.model.remat = "full"  # of one device, memory; of a pod, time
  assert config_lib.model(c) == config_lib.model(paper)
  adapters = card == "finetune_lora"
  assert (c.lora.rank > 0, c.train.ema_decay > 0) == (adapters, adapters)
  with pytest.raises(ValueError, match="fine-tuning knows the variant :small, not :medium"):
    module["get_config"]("medium")
