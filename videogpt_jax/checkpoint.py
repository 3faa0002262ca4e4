"""Checkpoints: saved while training goes on, found again whole or not at all.

Orbax writes a checkpoint under a temporary name and renames it when it is complete. What it
consists of, and how a damaged one is told from a whole one, is in `checkpoint_files`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import pathlib
import shutil
import time
from typing import Any

from absl import logging
from flax import serialization
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from videogpt_jax import backbone
from videogpt_jax import checkpoint_files
from videogpt_jax import distributed
from videogpt_jax import errors
from videogpt_jax import retention
from videogpt_jax.errors import InputError
from videogpt_jax.errors import StorageError

PyTree = Any

_DAMAGED = "damaged-"
_LATER = ("typical_norm",)  # entries of the state that older checkpoints lack; they start at zero
_POLL_SECONDS = 0.01
_SAVE_SECONDS = 6 * 3600  # that processes wait for each other while one of them writes and checks

# Leaves of `config.model` that change how the model is computed, not what it is.
_HOW_ONLY = {"model": set(backbone.NUMERICS), "codec": {"path", "moments", "precision", "tile"},
             "lora": {"base_dtype"}}


class Checkpoints:
  """The checkpoints of one run, newest first in everything.

  Opening the folder removes what a killed save left behind. If the newest checkpoint is
  damaged, a warning says why, it is renamed to `damaged-STEP` and the one before counts as
  the newest. All processes of a multi-host run make the same calls in the same order.

  Args:
    workdir: of the run.
    keep: which of the finished ones stay.
    save_every: steps between two.
    failures: saves in a row that may fail, with a warning, before the run ends. The state is
      not lost by one: the next save has all of it. Of several processes the first refusal ends
      the one that meets it: the others cannot know of it, and a launcher starts all again from
      the checkpoint before.
    retry_seconds: wait before a save that `wait`s is tried again, doubled every time.

  Raises:
    InputError: the folder cannot be made, or it holds checkpoints and none is whole
      (so that a run never starts from scratch over a run that was).
    StorageError: the system refuses for now to make or read it.
  """

  def __init__(self, workdir: str | pathlib.Path, *, keep: retention.Retention, save_every: int,
               failures: int = 0, retry_seconds: float = 5.0):
    if save_every < 1 or failures < 0:
      raise InputError(f"checkpoint.every ({save_every}) must be at least 1, checkpoint.failures "
                       f"({failures}) at least 0")
    self.directory = pathlib.Path(workdir).absolute() / checkpoint_files.FOLDER
    self._save_every = save_every
    self._failures, self._failed, self._retry_seconds = failures, 0, retry_seconds
    self._saving: int | None = None
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._latest = distributed.from_first(lambda: _set_aside_damaged(self.directory))
      self._losses = _held_out_losses(self.directory)
      self._manager = self._open_manager(keep)
    except OSError as error:
      raise errors.refused(f"cannot write checkpoints to {self.directory}: {error}",
                           error) from error

  def _open_manager(self, keep: retention.Retention) -> "_Manager":
    checkpoint_files.quiet_orbax()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=retention.Policy(keep, self._losses),
      cleanup_tmp_directories=True,
      lightweight_initialize=True,
      async_options=ocp.AsyncOptions(
        timeout_secs=_SAVE_SECONDS, post_finalization_callback=self._write_checksums),
    )
    return _Manager(
      self.directory,
      item_names=(checkpoint_files.STATE, checkpoint_files.EXTRA),
      item_handlers={
        checkpoint_files.STATE: ocp.StandardCheckpointHandler(),
        checkpoint_files.EXTRA: ocp.JsonCheckpointHandler(),
      },
      options=options,
    )

  def due(self, step: int) -> bool:
    """Whether the cadence asks for a checkpoint after `step` finished steps."""
    return step % self._save_every == 0

  def latest_step(self) -> int | None:
    """The newest whole checkpoint, finished saves of this process included."""
    return self._latest

  def save(
    self, step: int, state: PyTree, extra: Mapping[str, Any], *, wait: bool = False
  ) -> None:
    """Saves in the background what `state` holds now; its buffers may be donated at once.

    Does nothing if the newest checkpoint is of this step already.

    Args:
      step: number of finished steps.
      state: any pytree of arrays that `flax.serialization` turns into nested dicts.
      extra: JSON-able; `config` and `fingerprint` are what `compare` looks at, `held_out` is
        the loss by which the best checkpoints are found.
      wait: return only when the checkpoint is whole on disk.

    Raises:
      StorageError: this save, or the one before it, could not be written (disk full, storage
        unreachable), and so many before it that no more failures are allowed. Older checkpoints
        stay whole.
    """
    self.wait()
    seconds = self._retry_seconds
    while step != self._latest:
      self._begin(step, state, extra)
      if not wait:
        return
      self.wait()
      if step != self._latest:
        time.sleep(seconds)
        seconds *= 2

  def _begin(self, step: int, state: PyTree, extra: Mapping[str, Any]) -> None:
    self._saving, self._losses[step] = step, extra.get(checkpoint_files.HELD_OUT)
    tree = serialization.to_state_dict(state)
    save_args = ocp.SaveArgs(chunk_byte_size=checkpoint_files.CHUNK_BYTES)
    chunks = jax.tree.map(lambda _: save_args, tree)
    args = ocp.args.Composite(
      **{
        checkpoint_files.STATE: ocp.args.StandardSave(tree, save_args=chunks),
        checkpoint_files.EXTRA: ocp.args.JsonSave(dict(extra)),
      }
    )
    with self._write_errors():
      self._manager.save(step, args=args, force=True)

  def check(self) -> None:
    """Notices a background save that failed, as `wait` does; never waits."""
    saving = self._manager.is_saving_in_progress() and not self._manager.failed_alone()
    if self._saving is not None and not saving:
      self.wait()

  def wait(self) -> None:
    """Waits until a save under way is whole on disk. Raises `StorageError` as `save` does."""
    with self._write_errors():
      while self._manager.is_saving_in_progress():
        if error := self._manager.failed_alone():
          raise error
        time.sleep(_POLL_SECONDS)
      self._manager.wait_until_finished()
    if self._saving is not None:
      self._latest, self._saving, self._failed = self._saving, None, 0

  def close(self) -> None:
    """Waits for a save under way and frees threads. Raises `StorageError` as `wait` does."""
    if self._manager.failed_alone():  # and has been told; orbax would wait for the others
      return
    try:
      self.wait()
    finally:
      self._manager.close()

  def verify(self) -> int | None:
    """Reads the newest checkpoint through, before something is given up for what it holds.

    A damaged one is set aside as when the folder was opened.

    Returns:
      The step of the newest whole one, now what `latest_step` says; None if there is none.

    Raises:
      InputError: there are some, and none is whole.
      StorageError: they cannot be read for now; or a save under way fails, see `save`.
    """
    self.wait()
    latest = distributed.from_first(lambda: _set_aside_damaged(self.directory))
    if latest != self._latest:
      self._latest = latest
      self._manager.reload()  # orbax would take what was set aside for saved
    return self._latest

  def latest_extra(self) -> dict[str, Any] | None:
    """The `extra` of the newest whole checkpoint (tuples come back as lists), or None."""
    if self._latest is None:
      return None
    folder = self.directory / str(self._latest)
    return _read_extra(folder)

  def restore(self, target: PyTree) -> tuple[int, PyTree] | None:
    """The newest whole checkpoint as (step, state), or None if there is none.

    An EMA that the target lacks is not read; one that the checkpoint lacks starts from the
    parameters.

    Args:
      target: the tree to fill: arrays, or `jax.ShapeDtypeStruct`s whose shardings say
        where each leaf goes (no sharding: the first device). The devices may differ in
        number and arrangement from those that saved.

    Raises:
      InputError: names, shapes or types of the leaves differ from those saved.
      StorageError: the system refuses to read it.
    """
    self.wait()
    if self._latest is None:
      return None
    folder = self.directory / str(self._latest)
    wanted = jax.tree.map(_abstract, serialization.to_state_dict(target))
    saved = checkpoint_files.saved_tree(folder)
    ema = checkpoint_files.EMA
    fresh_ema = wanted.pop(ema, None) if ema not in saved else None
    if ema not in wanted:
      saved.pop(ema, None)
    later = {name: wanted.pop(name) for name in _LATER if name in wanted and name not in saved}
    differences = _leaf_differences(wanted, saved)
    if differences:
      raise InputError(
        f"the checkpoint {folder} does not fit this configuration:\n  "
        + "\n  ".join(_first(differences))
        + "\nuse the configuration it was saved with, or another workdir"
      )
    try:
      restored = checkpoint_files.restore(
        folder, wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
    except (OSError, ValueError) as error:
      if not (reason := checkpoint_files.system_failure(error)):
        raise
      raise StorageError(f"cannot read {folder}: {reason}") from error
    for name, leaf in later.items():
      restored[name] = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    if fresh_ema is not None:
      restored[ema] = jax.tree.map(jnp.copy, restored[checkpoint_files.PARAMS])
    return self._latest, serialization.from_state_dict(target, restored)

  def _write_checksums(self) -> None:
    """Runs in orbax's thread when all files are complete, just before the rename."""
    if jax.process_index() != 0:
      return
    final = self.directory / str(self._saving)
    temporary = sorted(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
    checkpoint_files.seal(temporary[-1] if temporary else final)

  @contextlib.contextmanager
  def _write_errors(self) -> Iterator[None]:
    """Counts failures to write; one more than allowed is a `StorageError`. Others pass through."""
    try:
      yield
    except (OSError, ValueError) as error:
      reason = checkpoint_files.system_failure(error)
      if not reason:
        raise
      failed, self._saving = self._saving, None
      if jax.process_count() > 1:
        raise StorageError(f"the checkpoint of step {failed} could not be written to "
                           f"{self.directory}: {reason}") from error
      self._failed += 1
      self._clear(failed)
      last = "there is no older one" if self._latest is None else f"step {self._latest} is whole"
      message = (f"the checkpoint of step {failed} could not be written to {self.directory} "
                 f"({last}): {reason}; free some space or mend the folder")
      if self._failed > self._failures:
        raise StorageError(f"{message}, then run the same command again") from error
      logging.warning("%s; failure %d of %d that are allowed in a row", message, self._failed,
                      self._failures)

  def _clear(self, failed: int | None) -> None:
    """Makes room: what a failed save has written goes, and orbax looks anew what there is.

    It counts those as deleted that it would have deleted after the save.
    """
    for part in self.directory.glob(f"{failed}.orbax-checkpoint-tmp*"):
      shutil.rmtree(part, ignore_errors=True)
    self._manager.reload()


class _Manager(ocp.CheckpointManager):
  """Orbax's, which is told when to save and does not look out for preemptions itself.

  At one it would subtract the times of two checkpoints, and fail (orbax 0.12) where one was read
  from disk.
  """

  _failure: Exception | None = None

  def reached_preemption(self, step: int) -> bool:
    """`distributed.stopping` sees to it."""
    return False

  def failed_alone(self) -> Exception | None:
    """What went wrong in this of several processes, for which orbax waits before it tells."""
    return self._failure if jax.process_count() > 1 else None

  def _wait_for_checkpointers(self) -> None:
    try:
      super()._wait_for_checkpointers()
    except Exception as error:
      self._failure = error
      raise


def compare(now: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
  """What forbids a run with `now` to resume a checkpoint saved with `saved`.

  Args:
    now: the `extra` that this run would save: `config` (nested dict) and `fingerprint`.
    saved: the `extra` of the checkpoint (`Checkpoints.latest_extra`).

  Returns:
    One line for each difference in the model, its adapters, the codec or the data; empty if none.
    Settings that only change how a model is computed, and all others (steps, learning
    rate, ...), may differ, and so may settings that one side does not know.
  """
  differences = []
  for section, how_only in _HOW_ONLY.items():
    ours = _leaves(now["config"].get(section, {}))
    theirs = _leaves(saved["config"].get(section, {}))
    for name in sorted(ours.keys() & theirs.keys()):
      if name in how_only:
        continue
      if _plain(ours[name]) != _plain(theirs[name]):
        differences.append(
          f"config.{section}.{name} is {ours[name]!r}, in the checkpoint {theirs[name]!r}"
        )
  if now.get("fingerprint") != saved.get("fingerprint"):
    differences.append(
      f"the data has fingerprint {now.get('fingerprint')}, "
      f"in the checkpoint {saved.get('fingerprint')}"
    )
  return differences


def _read_extra(folder: pathlib.Path) -> dict[str, Any]:
  return checkpoint_files.patiently(
    folder, functools.partial(checkpoint_files.read_extra, folder))


def _held_out_losses(directory: pathlib.Path) -> dict[int, float | None]:
  """The held-out losses at the steps of the finished checkpoints, as far as they are known."""
  losses: dict[int, float | None] = {}
  for step in checkpoint_files.steps(directory):
    folder = directory / str(step)
    try:
      losses[step] = _read_extra(folder).get(checkpoint_files.HELD_OUT)
    except InputError:  # nor is it known then whether it is one of the best, which stay
      raise
    except (OSError, ValueError):  # an old one that is damaged, or that another process deletes
      losses[step] = None
  return losses


def _set_aside_damaged(directory: pathlib.Path) -> int | None:
  """Renames damaged checkpoints newer than the newest whole one; returns that one's step.

  Older ones of which files are missing are deleted: orbax deletes file by file, so a kill leaves
  such.
  """
  damaged: dict[int, str] = {}
  latest = None
  for step in checkpoint_files.steps(directory):
    reason = checkpoint_files.damage(directory / str(step))
    if not reason:
      latest = step
      break
    damaged[step] = reason
  if damaged and latest is None:
    raise InputError(
      f"no checkpoint in {directory} is whole:\n  "
      + "\n  ".join(f"step {step}: {reason}" for step, reason in damaged.items())
      + "\ndelete or move that folder to start again from scratch"
    )
  for step, reason in damaged.items():
    logging.warning(
      "the checkpoint of step %d is damaged (%s); going back to step %d", step, reason, latest
    )
    aside = directory / f"{_DAMAGED}{step}"
    shutil.rmtree(aside, ignore_errors=True)
    (directory / str(step)).rename(aside)
  for step in checkpoint_files.steps(directory):
    if not checkpoint_files.has_all_files(directory / str(step)):
      logging.warning("deletes what is left of the checkpoint of step %d: files of it are missing",
                      step)
      shutil.rmtree(directory / str(step), ignore_errors=True)
  return latest


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaf_differences(wanted: PyTree, saved: PyTree) -> list[str]:
  """One line for each leaf that is missing on one side or differs in shape or type."""
  ours, theirs = (
    {name: leaf for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()
     if leaf is not None}
    for tree in (wanted, saved)
  )
  lines = []
  for name in sorted(ours.keys() | theirs.keys()):
    here, there = (
      f"{np.dtype(side[name].dtype).name}{list(side[name].shape)}" if name in side else "absent"
      for side in (ours, theirs)
    )
    if here != there:
      lines.append(f"{name} is {here}, in the checkpoint {there}")
  return lines


def _leaves(section: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(section), sep=".")


def _plain(value: Any) -> Any:
  """A value as JSON gives it back: tuples are lists there."""
  return list(value) if isinstance(value, tuple) else value


def _first(lines: list[str], count: int = 8) -> list[str]:
  more = len(lines) - count
  return lines if more <= 0 else [*lines[:count], f"... and {more} more"]
