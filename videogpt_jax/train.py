"""The training loop.

Order of a run: configuration checked, data opened, state found (resume > init from >
scratch), then for every step: next batch, one train step, metrics of the step before
fetched; and at their cadence a log line, the evaluators (`videogpt_jax.evaluators`), a
checkpoint. The data position is the step, so a resumed run continues bit for bit.

Each of these stands in a `with` block of the log, which knows the time that it took
(`telemetry.goodput`) and tells the watchdog that it ended.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
from typing import Any

from flax import traverse_util
import jax
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import attention
from videogpt_jax import base as base_lib
from videogpt_jax import checkpoint
from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import distributed
from videogpt_jax import evaluators as evaluators_lib
from videogpt_jax import recovery
from videogpt_jax import retention
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import train_log
from videogpt_jax import watchdog
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.errors import InputError
from videogpt_jax.telemetry import goodput
from videogpt_jax.telemetry import mirror


def train(config: ConfigDict, workdir: str) -> int:
  """Trains until `config.train.steps`, or a signal; returns the steps finished.

  Raises:
    InputError: bad configuration, data, or workdir; a checkpoint that does not fit; too
      many non-finite updates in a row (the last checkpoint is intact).
  """
  account = goodput.Account()
  config_lib.validate(config)
  mirror.check(config.log.wandb)
  source, validation = open_data(config)
  recipe, mesh = config_lib.recipe(config), sharding.make_mesh(config.mesh)
  check_devices(config, mesh)
  opened = checkpoint.Checkpoints(
    workdir, save_every=config.checkpoint.every, failures=config.checkpoint.failures,
    keep=retention.Retention(config.checkpoint.keep, config.checkpoint.keep_every,
                             config.checkpoint.keep_best))
  with contextlib.closing(opened) as checkpoints:
    base = open_base(config)
    state = find_state(config, recipe, mesh, checkpoints, source.fingerprint, base)
    start = int(state.step)
    with contextlib.closing(telemetry.open_writer(
        workdir, start + 1, project=config.log.wandb, name=config.name,
        settings=config.to_dict())) as writer:
      run = evaluators_lib.Run(config, workdir, recipe, mesh, source, validation, writer, base)
      with sharding.use(mesh), distributed.stopping() as stop, _log(run, account, start) as log:
        return _loop(run, state, start, checkpoints, stop, log)


@contextlib.contextmanager
def _log(run: evaluators_lib.Run, account: goodput.Account, start: int
         ) -> Iterator[train_log.TrainLog]:
  """The log of the loop, under the watchdog's eyes."""
  settings = run.config.train
  action = settings.watchdog_action
  if action == "auto":
    action = "abort" if jax.process_count() > 1 else "report"
  with contextlib.ExitStack() as stack:
    dog = stack.enter_context(contextlib.closing(watchdog.Watchdog(
      run.workdir, settings.watchdog, action, process=jax.process_index())))
    yield stack.enter_context(contextlib.closing(train_log.TrainLog(
      run.config, run.recipe, run.source, run.writer, account, dog, workdir=run.workdir,
      start=start)))


def _loop(run: evaluators_lib.Run, state: step_lib.TrainState, start: int,
          checkpoints: checkpoint.Checkpoints, stop: distributed.Stop,
          log: train_log.TrainLog) -> int:
  steps = run.config.train.steps
  train_step = step_lib.compile_step(run.recipe, run.mesh)
  evaluators = evaluators_lib.of_run(run)
  recover = recovery.Recovery(run.recipe, run.mesh, checkpoints, run.config.train)
  done, stopped = start, False
  with contextlib.closing(training_batches(run, start)) as batches:
    while done < steps and not (stopped := stop.after(done)):
      with log.waiting():
        if not batches.wait(stop.pending):
          stopped = True
          break
        batch = next(batches)
      with log.stepping(done + 1, batch.latents.shape):
        state, metrics = train_step(state, batch.latents)
        done += 1
        log.add(done, metrics)
      due = [evaluator for evaluator in evaluators if evaluator.due(done)]
      save = checkpoints.due(done) and done < steps
      if due or save or recover.due(log.skipped):
        log.catch_up()  # the first two wait for the device anyway
      if recover.due(log.skipped):
        with log.aside(goodput.CHECKPOINT):
          state = recover(state, log)
      for evaluator in due:
        with log.aside(goodput.EVALUATION):
          evaluator.measure(done, state.shown)
      if save and not log.skipped:
        with log.aside(goodput.CHECKPOINT):
          checkpoints.save(done, state, run.extra(done))
        log.saved(done)
      checkpoints.check()
    # Before the batches are closed, which waits for the one being read: storage may hang.
    log.catch_up()
    if not log.skipped or done == steps:  # else what comes is found out anew from the last good one
      with log.aside(goodput.CHECKPOINT):
        checkpoints.save(done, state, run.extra(done), wait=True)
    if done > start:
      log.finish()
    if stopped and done < steps:
      run.writer.say(f"stopped by a signal after step {done}; the same command goes on from here")
  return done


# Before the loop --------------------------------------------------------------------------


def open_data(config: ConfigDict) -> tuple[pipeline.Mixture, pipeline.Mixture]:
  """The train and validation splits; `InputError` if they do not fit the configuration."""
  paths, weights = _mixture(config)
  opened = []
  for split in ("train", "validation"):
    sources = tuple(store.open_split(path, split) for path in paths)
    for path, source in zip(paths, sources, strict=True):
      _check_data(config, path, source)
    if len({(source.info.channels, source.info.dtype) for source in sources}) > 1:
      raise InputError("the data sets of config.data.mixture store latents in different ways "
                       "(type, or moments and means); encode them alike")
    # However few, held-out videos count.
    smallest = config.data.min_bucket if split == "train" else 1
    mixture = pipeline.Mixture(sources, weights, smallest)
    pipeline.buckets(mixture, config.data.frames, tuple(config.data.interval))
    opened.append(mixture)
  return opened[0], opened[1]


def _mixture(config: ConfigDict) -> tuple[list[str], tuple[float, ...]]:
  """Paths and weights of the data sets."""
  if not config.data.mixture:
    if not config.data.path:
      raise InputError("config.data.path is empty: name the folder that `encode` wrote")
    return [config.data.path], ()
  paths, weights = [], []
  for entry in config.data.mixture.split(","):
    path, equals, weight = entry.strip().partition("=")
    paths.append(path)
    try:
      weights += [float(weight)] if equals else []
    except ValueError as error:
      raise InputError(f"config.data.mixture: the weight of {entry!r} is no number") from error
  if weights and len(weights) != len(paths):
    raise InputError("config.data.mixture: give every data set a weight (PATH=WEIGHT), or none")
  return paths, tuple(weights)


def _check_data(config: ConfigDict, path: str, source: store.Source) -> None:
  """Raises `InputError` unless a data set holds what the configuration asks for."""
  codec, fit, info = config_lib.codec(config), config_lib.fit(config), source.info
  if codec_lib.stored(info.codec) != codec_lib.stored(codec.spec()):
    raise InputError(
      f"the data set {path} holds latents of codec {codec_lib.stored(info.codec)}, the "
      f"configuration asks for {codec_lib.stored(codec.spec())}; encode again, or mend "
      "config.codec")
  sizes = np.unique(source.sizes, axis=0) * codec.downsample
  if wrong := [f"{h}x{w}" for h, w in sizes.tolist() if not fit.holds((h, w))]:
    raise InputError(
      f"the data set {path} holds frames of {', '.join(wrong[:5])} px, the configuration asks for "
      f"{fit}; encode again, or mend config.data.height and width, buckets or longest_side")
  if config.data.posterior != "mean" and not info.moments:
    raise InputError(
      f"config.data.posterior is {config.data.posterior!r}, but the data set {path} holds means "
      "alone; use 'mean', or encode again with --config.codec.moments=True")


def check_devices(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Raises `InputError` unless batch and model divide among the devices, and they can attend."""
  reason = attention.unavailable(config.model.attention)
  if reason:
    raise InputError(f"config.model.attention is {config.model.attention!r}: {reason}; use 'auto'")
  devices = int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES]))
  rows = config.train.batch_size // config.train.accumulation
  if rows % devices:
    raise InputError(
      f"config.train.batch_size {config.train.batch_size} in {config.train.accumulation} "
      f"microbatch(es) of {rows} rows does not divide among {devices} devices"
    )
  recipe = config_lib.recipe(config)
  stack, shards = recipe.model.backbone, mesh.shape["tensor"] * mesh.shape["sequence"]
  if stack.num_heads % math.lcm(stack.num_kv_heads, shards):
    raise InputError(
      f"config.model.num_heads {stack.num_heads} over {stack.num_kv_heads} heads of keys cannot be "
      f"split over config.mesh.tensor x sequence = {mesh.shape['tensor']} x "
      f"{mesh.shape['sequence']} devices")
  parameters = step_lib.abstract_state(recipe, mesh).params
  for name, leaf in traverse_util.flatten_dict(parameters, sep="/").items():
    try:
      leaf.sharding.shard_shape(leaf.shape)
    except ValueError as error:
      raise InputError(
        f"the parameter {name} of shape {leaf.shape} does not divide among the devices of the mesh "
        f"{dict(mesh.shape)}, split as {leaf.sharding.spec}; choose another config.mesh") from error


def find_state(config: ConfigDict, recipe: step_lib.Recipe, mesh: jax.sharding.Mesh,
               checkpoints: checkpoint.Checkpoints, fingerprint: str,
               base: base_lib.Base | None = None) -> step_lib.TrainState:
  """The state to start from. Precedence: resume > init from > scratch.

  Adapters have a `base` (see `open_base`), which is read in any case.
  """
  abstract = step_lib.abstract_state(recipe, mesh)
  saved = checkpoints.latest_extra()
  if saved is not None:
    now = {"config": config.to_dict(), "fingerprint": fingerprint}
    differences = checkpoint.compare(now, saved)
    if differences:
      raise InputError(
        f"{checkpoints.directory.parent} holds a run that this one cannot resume: "
        + "; ".join(differences) + "; use another --workdir, or the run's own settings"
      )
    if base is not None:
      base.recognise(saved.get("base"), str(checkpoints.directory.parent))
    restored = checkpoints.restore(abstract)
    assert restored is not None
    if base is not None:
      frozen = initial_params(base.source, recipe, abstract.base)
      restored = restored[0], dataclasses.replace(restored[1], base=frozen)
    print(f"resuming {checkpoints.directory.parent} at step {restored[0]}", flush=True)
    return restored[1]
  if not config.checkpoint.init_from:
    return step_lib.create_state(recipe, mesh)
  if base is not None:
    params = initial_params(base.source, recipe, abstract.base)
  else:
    params = initial_params(config.checkpoint.init_from, recipe, abstract.params)
  print(f"starting from the weights of {config.checkpoint.init_from}", flush=True)
  return step_lib.create_state(recipe, mesh, params)


def open_base(config: ConfigDict) -> base_lib.Base | None:
  """The weights that adapters are trained beside; None: everything is trained."""
  if not config.lora.rank:
    return None
  return base_lib.Base(weights_lib.open_source(config.checkpoint.init_from))


def initial_params(source: str | weights_lib.Source, recipe: step_lib.Recipe, wanted: Any) -> Any:
  """The weights of `source`, or at that path, placed as the tree `wanted` says and in its types.

  Raises:
    InputError: they belong to another model, or to latents scaled otherwise.
  """
  if isinstance(source, str):
    source = weights_lib.open_source(source)
  path, places = source.path, {}
  for name, leaf in traverse_util.flatten_dict(wanted, sep="/").items():
    found = source.leaves.get(name)
    if found is None or tuple(found.shape) != leaf.shape:
      there = "absent" if found is None else f"of shape {tuple(found.shape)}"
      raise InputError(f"{path} holds another model: the parameter {name} is {there}, "
                       f"{leaf.shape} is needed")
    places[name] = leaf
  differences = config_lib.model_differences(recipe.model, source.model)
  theirs, ours = codec_lib.from_settings(source.config["codec"]).spec(), recipe.codec.spec()
  differences += [f"--config.codec.{name}={theirs.get(name)} (it is {ours.get(name)!r} here)"
                  for name in sorted(ours.keys() | theirs.keys())
                  if ours.get(name) != theirs.get(name)]
  if differences:
    raise InputError(f"{path} holds a model of other settings; to go on from it, give "
                     + " ".join(differences))
  return weights_lib.parameters(source, lambda name, array: jax.device_put(
    array.astype(places[name].dtype, copy=False), places[name].sharding))


def training_batches(run: evaluators_lib.Run, start: int) -> pipeline.DeviceBatches:
  """Batches from step `start` on, already on the devices."""
  data, batch_size = run.config.data, run.config.train.batch_size
  rows = sharding.rows(run.mesh)
  host_batches = pipeline.batches(
    run.source, frames=data.frames, interval=tuple(data.interval), batch_size=batch_size,
    seed=run.config.seed, start_step=start, workers=data.workers, prefetch=data.prefetch,
    rows=pipeline.local_rows(rows, batch_size))
  return pipeline.to_device(host_batches, rows, data.prefetch, batch_size)
