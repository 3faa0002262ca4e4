"""The training loop.

Order of a run: configuration checked, data opened, state found (resume > init from >
scratch), then for every step: next batch, one train step, metrics of the step before
fetched; and at their cadence a log line, the held-out loss, rolled-out videos, a
checkpoint. The data position is the step, so a resumed run continues bit for bit.
"""

from collections.abc import Generator
import contextlib
import dataclasses
import threading
import time
from typing import Any

from absl import logging
from flax import traverse_util
import jax
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import attention
from videogpt_jax import base as base_lib
from videogpt_jax import checkpoint
from videogpt_jax import cli
from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import flops
from videogpt_jax import held_out
from videogpt_jax import machine
from videogpt_jax import optimizer as optimizer_lib
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.data import video
from videogpt_jax.errors import InputError


@dataclasses.dataclass
class Run:
  """What the parts of the loop share."""

  config: ConfigDict
  workdir: str
  recipe: step_lib.Recipe
  mesh: jax.sharding.Mesh
  source: pipeline.Mixture
  validation: pipeline.Mixture
  writer: telemetry.Writer
  base: base_lib.Base | None = None

  def extra(self) -> dict[str, Any]:
    """What is saved beside the state."""
    base = {} if self.base is None else {"base": self.base.record()}
    return {"config": self.config.to_dict(), "fingerprint": self.source.fingerprint, **base}


def train(config: ConfigDict, workdir: str) -> int:
  """Trains until `config.train.steps`, or a signal; returns the steps finished.

  Raises:
    InputError: bad configuration, data, or workdir; a checkpoint that does not fit; too
      many non-finite updates in a row (the last checkpoint is intact).
  """
  config_lib.validate(config)
  source, validation = open_data(config)
  recipe, mesh = config_lib.recipe(config), sharding.make_mesh(config.mesh)
  check_devices(config, mesh)
  opened = checkpoint.Checkpoints(
    workdir, keep=config.checkpoint.keep, save_every=config.checkpoint.every
  )
  with contextlib.closing(opened) as checkpoints:
    base = open_base(config)
    state = find_state(config, recipe, mesh, checkpoints, source.fingerprint, base)
    start = int(state.step)
    with contextlib.closing(telemetry.Writer(workdir, start + 1)) as writer:
      run = Run(config, workdir, recipe, mesh, source, validation, writer, base)
      with sharding.use(mesh), cli.stop_signal() as stop:
        return _loop(run, state, start, checkpoints, stop)


def _loop(run: Run, state: step_lib.TrainState, start: int,
          checkpoints: checkpoint.Checkpoints, stop: threading.Event) -> int:
  steps = run.config.train.steps
  train_step = step_lib.compile_step(run.recipe, run.mesh)
  evaluators = (Validation(run), Videos(run))
  log = TrainLog(run, start)
  done = start
  with contextlib.closing(training_batches(run, start)) as batches:
    while done < steps and not stop.is_set():
      with log.waiting:
        batch = next(batches)
      state, metrics = train_step(state, batch.latents)
      done += 1
      log.add(done, metrics)
      due = [evaluator for evaluator in evaluators if evaluator.due(done)]
      save = checkpoints.due(done) and done < steps
      if due or save:  # they wait for the device anyway
        log.catch_up()
      with log.progress.paused():
        for evaluator in due:
          evaluator(done, state.shown)
        if save:
          checkpoints.save(done, state, run.extra())
        checkpoints.check()
  log.catch_up()
  checkpoints.save(done, state, run.extra(), wait=True)
  if stop.is_set() and done < steps:
    print(f"stopped by a signal after step {done}; the same command goes on from here", flush=True)
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
  """Raises `InputError` unless every microbatch divides among the devices, and they can attend."""
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


def training_batches(run: Run, start: int) -> Generator[pipeline.Batch, None, None]:
  """Batches from step `start` on, already on the devices."""
  data = run.config.data
  host_batches = pipeline.batches(
    run.source, frames=data.frames, interval=tuple(data.interval),
    batch_size=run.config.train.batch_size, seed=run.config.seed, start_step=start,
    workers=data.workers, prefetch=data.prefetch, host=jax.process_index(),
    hosts=jax.process_count())
  return pipeline.to_device(host_batches, sharding.rows(run.mesh), data.prefetch)


# At a cadence -----------------------------------------------------------------------------


class TrainLog:
  """Fetches the metrics of steps, one step late, and writes them at the cadence of the log."""

  def __init__(self, run: Run, start: int):
    self._run = run
    self._late: tuple[int, step_lib.Metrics] | None = None
    self._fetched: list[dict[str, np.ndarray]] = []
    self._schedule = optimizer_lib.learning_rate(run.recipe.optimizer)
    cost = _expected_cost(run)
    device = jax.devices()[0]
    peak = machine.peak_flops_per_device(device)
    self.progress = telemetry.Progress(
      run.config.train.steps, start, tokens_per_step=cost.tokens, flops_per_step=cost.total,
      peak_flops=peak * jax.device_count() if peak else None)
    self.waiting = telemetry.Stopwatch()  # of the loop, for data
    self._began = time.perf_counter()
    self._seconds_before = run.writer.last("train_seconds")  # of the runs that this one resumes
    self._start = start

  def add(self, step: int, metrics: step_lib.Metrics) -> None:
    """Takes the metrics of a step under way, and fetches those of the step before."""
    self.catch_up()
    self._late = step, metrics
    if step == self._start + 1:  # the clock starts when compilation is over
      jax.block_until_ready(metrics)
      seconds = time.perf_counter() - self._began
      print(f"first step done after {seconds:.1f} s (compilation included)", flush=True)
      self.progress.start(step)
      self.waiting.take()

  def catch_up(self) -> None:
    """Fetches the metrics that were left on the device; waits for their step.

    Raises:
      InputError: too many updates in a row were not finite.
    """
    if self._late is None:
      return
    step, metrics = self._late
    self._late = None
    self._fetched.append(jax.device_get(metrics))
    config, bad = self._run.config, int(self._fetched[-1]["bad_steps"])
    if bad:
      logging.warning("step %d: loss or gradient is not finite, update skipped (%d in a row)",
                      step, bad)
    if step % config.log.every == 0 or step == config.train.steps:
      self._write(step)
    if bad >= config.train.max_bad_steps:
      raise InputError(
        f"{bad} updates in a row had a non-finite loss or gradient; the last checkpoint is "
        "intact: lower config.optimizer.learning_rate or look at the data, then go on from it")

  def _write(self, step: int) -> None:
    """One line, TensorBoard and JSONL for the steps fetched since the last one."""
    total = held_out.add_up(self._fetched)
    values = held_out.means(total)
    values["grad_norm"] = float(total["grad_norm"] / len(self._fetched))
    values["learning_rate"] = float(self._schedule(step - 1))
    values["skipped"] = float(self._fetched[-1]["skipped"])
    self._fetched.clear()
    speed = self.progress.update(step, self.waiting.take())
    seconds = self._seconds_before + time.perf_counter() - self._began
    self._run.writer.scalars(step, {**values, **speed, "train_seconds": seconds})
    shown = {"loss": values["loss"], "gnorm": values["grad_norm"], "lr": values["learning_rate"]}
    if values["skipped"]:
      shown["skipped"] = values["skipped"]
    print(self.progress.line(step, shown, speed), flush=True)


class Validation:
  """Loss on held-out videos, every time the same ones with the same noise."""

  def __init__(self, run: Run):
    self._run = run
    self._loss = held_out.Loss(run.config, run.recipe, run.mesh, run.validation)

  def due(self, step: int) -> bool:
    """Whether to run after `step` steps."""
    return step % self._run.config.log.validate_every == 0 or step == self._run.config.train.steps

  def __call__(self, step: int, params: Any) -> None:
    values = {f"validation/{name}": value for name, value in self._loss(params).items()}
    self._run.writer.scalars(step, values)
    print(f"step {step} held-out loss {values['validation/loss']:.5f}", flush=True)


class Videos:
  """Rolls out held-out videos and shows them beside the truth.

  Training needs no autoencoder, videos do: without one, a warning takes their place.
  """

  def __init__(self, run: Run):
    self._run = run
    self._count = min(run.config.log.videos, len(run.validation))
    if self._count:
      try:
        run.recipe.codec.prepare()
      except InputError as error:
        self._count = 0
        logging.warning("no videos will be shown: %s; set --config.codec.path, or "
                        "--config.log.videos=0", error)

  def due(self, step: int) -> bool:
    """Whether to run after `step` steps."""
    config = self._run.config
    last = step == config.train.steps
    return bool(self._count) and (step % config.log.videos_every == 0 or last)

  def __call__(self, step: int, params: Any) -> None:
    run, sample = self._run, self._run.config.sample
    frames = run.config.data.frames
    count = self._count
    rows = next(pipeline.batches(
      run.validation, frames=frames, interval=tuple(run.config.data.interval), batch_size=count,
      seed=run.config.seed))
    codec = run.recipe.codec
    truth = codec.decode(rows.latents)
    model = weights_lib.Weights(run.recipe.model, params, codec, run.config.to_dict(), run.workdir,
                                run.mesh)
    new = model.continue_video(truth[:, :sample.history], frames - sample.history,
                               rng=jax.random.key(run.config.seed))
    predicted = np.concatenate([truth[:, :sample.history], new], axis=1)
    scale = max(1, 128 // truth.shape[2])
    for i in range(count):
      columns = {"truth": truth[i], "prediction": predicted[i]}
      shown = video.side_by_side(columns, scale=scale, history=sample.history)
      path = run.writer.video(step, f"rollout_{i}", shown, fps=8.0)
    print(f"step {step} wrote {count} rollouts like {path}", flush=True)


def _expected_cost(run: Run) -> flops.Cost:
  """Of a step, over the sizes of frames."""
  data, recipe = run.config.data, run.recipe
  shares = pipeline.buckets(run.source, data.frames, tuple(data.interval))
  costs = [(share, flops.training(recipe.model, recipe.objective, run.config.train.batch_size,
                                  (data.frames, *size, recipe.codec.channels)))
           for size, share in shares.items()]
  return flops.expected(costs)
