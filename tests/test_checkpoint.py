"""Checkpoints against what can befall them: kills, damage, full disks, other devices."""

import contextlib
import errno
import math
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

from absl import logging
from flax import struct
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from videogpt_jax import checkpoint
from videogpt_jax import checkpoint_files
from videogpt_jax import retention
from videogpt_jax.errors import InputError
from videogpt_jax.errors import StorageError

EXTRA = {"config": {"model": {"hidden_size": 8}, "codec": {"id": "pixels"}}, "fingerprint": "f1"}


class State(struct.PyTreeNode):
  """What a train state looks like: a dataclass with optax's named tuples inside."""

  step: jax.Array
  params: dict
  ema: dict
  opt_state: optax.OptState


def _state(step: int, width: int = 8) -> State:
  key = jax.random.fold_in(jax.random.key(0), step)
  params = {"proj": {"kernel": jax.random.normal(key, (4, width))}, "norm": {}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  opt_state = tx.update(params, tx.init(params), params)[1]
  ema = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  return State(step=jnp.int32(step), params=params, ema=ema, opt_state=opt_state)


def _open(workdir: pathlib.Path, keep: int = 2) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(workdir, keep=retention.Retention(keep), save_every=10)


def _save(workdir: pathlib.Path, *steps: int, keep: int = 2) -> pathlib.Path:
  checkpoints = _open(workdir, keep)
  for step in steps:
    checkpoints.save(step, _state(step), {**EXTRA, "at": step})
  checkpoints.close()
  return checkpoints.directory


def _assert_restores(workdir: pathlib.Path, step: int) -> None:
  checkpoints = _open(workdir)
  found, state = checkpoints.restore(jax.eval_shape(lambda: _state(0)))
  assert checkpoints.latest_extra()["at"] == step
  checkpoints.close()
  assert found == step
  expected = _state(step)
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
  said: list[str] = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
  return said


def test_state_comes_back_bit_equal_with_its_classes(tmp_path):
  _save(tmp_path, 10)
  _assert_restores(tmp_path, 10)


def test_an_empty_workdir_has_no_checkpoint(tmp_path):
  checkpoints = _open(tmp_path / "new" / "run")
  assert checkpoints.restore(_state(0)) is None
  assert checkpoints.latest_extra() is None
  assert checkpoints.latest_step() is None
  checkpoints.close()


def test_only_the_newest_are_kept(tmp_path):
  directory = _save(tmp_path, 1, 2, 3, 4, keep=2)
  assert sorted(path.name for path in directory.iterdir()) == ["3", "4"]


def test_cadence(tmp_path):
  checkpoints = _open(tmp_path)
  assert [step for step in range(1, 31) if checkpoints.due(step)] == [10, 20, 30]
  checkpoints.close()


def test_saving_a_step_again_changes_nothing(tmp_path):
  directory = _save(tmp_path, 5)
  before = (directory / "5" / "checksums.json").stat().st_mtime_ns
  _save(tmp_path, 5)
  assert (directory / "5" / "checksums.json").stat().st_mtime_ns == before


def test_a_save_holds_the_values_of_its_moment_although_buffers_are_donated(tmp_path):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((2048, 1024))
  checkpoints = _open(tmp_path)
  for i in range(1, 4):
    checkpoints.save(i, {"x": x}, EXTRA)
    for _ in range(5):
      x = step(x)
    x.block_until_ready()
    restored = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert restored[0] == i
    np.testing.assert_array_equal(restored[1]["x"], 5.0 * (i - 1))
  checkpoints.close()


def _flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGE = {
  "flipped bit": _flip,
  "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
  "empty": lambda path: os.truncate(path, 0),
  "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file_of_the_newest_is_found_and_the_one_before_taken(
  tmp_path, how, warnings
):
  whole = _save(tmp_path / "whole", 10, 20)
  files = [path.relative_to(whole) for path in (whole / "20").rglob("*") if path.is_file()]
  files = [path for path in files if path.parts[1] in ("state", "extra")]
  assert len(files) > 5
  for file in files:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run / checkpoint_files.FOLDER)
    DAMAGE[how](run / checkpoint_files.FOLDER / file)
    warnings.clear()
    checkpoints = _open(run)
    assert checkpoints.latest_step() == 10, file
    checkpoints.close()
    assert "step 20" in warnings[0] and "step 10" in warnings[0]
    assert str(pathlib.Path(*file.parts[1:])) in warnings[0]
  _assert_restores(run, 10)


@pytest.mark.parametrize("name", ["checksums.json", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("how", ["empty", "deleted"])
def test_damaged_bookkeeping_is_damage_too(tmp_path, name, how, warnings):
  directory = _save(tmp_path, 10, 20)
  DAMAGE[how](directory / "20" / name)
  _assert_restores(tmp_path, 10)
  assert "step 20" in warnings[0]


def test_after_damage_the_run_goes_on_and_saves_that_step_again(tmp_path, warnings):
  directory = _save(tmp_path, 10, 20)
  _flip(directory / "20" / "state" / "manifest.ocdbt")
  _save(tmp_path, 20)
  assert (directory / "damaged-20").is_dir()
  _assert_restores(tmp_path, 20)


def test_damage_is_found_before_the_state_is_given_up_for_what_is_saved(tmp_path, warnings):
  checkpoints = _open(tmp_path)
  for step in (10, 20):
    checkpoints.save(step, _state(step), {**EXTRA, "at": step}, wait=True)
  assert checkpoints.verify() == 20
  _flip(checkpoints.directory / "20" / "state" / "manifest.ocdbt")
  assert checkpoints.verify() == checkpoints.latest_step() == 10
  assert "step 20 is damaged" in warnings[0]
  step, state = checkpoints.restore(jax.eval_shape(lambda: _state(0)))
  assert step == 10
  np.testing.assert_array_equal(state.params["proj"]["kernel"], _state(10).params["proj"]["kernel"])
  checkpoints.save(20, _state(20), {**EXTRA, "at": 20}, wait=True)
  checkpoints.close()
  _assert_restores(tmp_path, 20)


def test_a_damaged_older_checkpoint_does_not_matter(tmp_path):
  directory = _save(tmp_path, 10, 20)
  shutil.rmtree(directory / "10" / "state")
  (directory / "10" / "_CHECKPOINT_METADATA").write_text("{")
  _assert_restores(tmp_path, 20)
  _save(tmp_path, 30)
  _assert_restores(tmp_path, 30)


def test_if_none_is_whole_the_run_stops_instead_of_starting_over(tmp_path):
  directory = _save(tmp_path, 10, 20)
  for step in ("10", "20"):
    _flip(directory / step / "state" / "manifest.ocdbt")
  for _ in range(2):  # the refusal must not clear the way for the next start
    with pytest.raises(InputError, match=r"(?s)step 20: .*manifest.*step 10: .*manifest"):
      _open(tmp_path)


_SAVER = """
import sys, time
import jax
from videogpt_jax import checkpoint
from videogpt_jax import retention

workdir, moment = sys.argv[1:]
write_checksums = checkpoint.Checkpoints._write_checksums
if moment == "before the rename":
  def hang_at_the_second(self):
    write_checksums(self)
    if self._saving == 2:
      time.sleep(600)
  checkpoint.Checkpoints._write_checksums = hang_at_the_second
state = lambda seed: {"x": jax.random.uniform(jax.random.key(seed), (8_000_000,))}
checkpoints = checkpoint.Checkpoints(workdir, keep=retention.Retention(1), save_every=1)
checkpoints.save(1, state(1), {"config": {}}, wait=True)
checkpoints.save(2, state(2), {"config": {}})
checkpoints.wait()
"""


def _start(script: str, *args: str, devices: int = 1) -> subprocess.Popen:
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script), *args],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, moment):
  process = _start(_SAVER, str(tmp_path), moment)
  directory = tmp_path / checkpoint_files.FOLDER
  deadline = time.monotonic() + 60
  pattern = "2.*/checksums.json" if moment == "before the rename" else "2.*"
  while not list(directory.glob(pattern)):
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert not (directory / "2").exists()
  left_behind = list(directory.glob("2.*"))
  assert left_behind

  checkpoints = checkpoint.Checkpoints(tmp_path, keep=retention.Retention(1), save_every=1)
  step, state = checkpoints.restore({"x": jax.ShapeDtypeStruct((8_000_000,), jnp.float32)})
  assert step == 1
  np.testing.assert_array_equal(state["x"], jax.random.uniform(jax.random.key(1), (8_000_000,)))
  checkpoints.save(2, state, EXTRA, wait=True)
  checkpoints.close()
  assert [path.name for path in directory.iterdir()] == ["2"]


@contextlib.contextmanager
def _largest_file(size: int):
  """Stands in for a full disk: the system refuses to write beyond `size` bytes of a file."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("noticed_by", ["wait", "check", "next save", "close"])
def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(tmp_path, noticed_by):
  _save(tmp_path, 10)
  checkpoints = _open(tmp_path)
  big = {"x": jax.random.normal(jax.random.key(0), (500_000,))}
  with _largest_file(1 << 20):
    checkpoints.save(20, big, EXTRA)
    with pytest.raises(
        StorageError, match=r"step 20 .*step 10 is whole.*File too large.*free some"):
      if noticed_by == "check":
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
          checkpoints.check()
          time.sleep(0.01)
      elif noticed_by == "next save":
        checkpoints.save(30, big, EXTRA)
      else:
        getattr(checkpoints, noticed_by)()
  _assert_restores(tmp_path, 10)


def test_a_run_may_save_again_when_the_disk_has_room_again(tmp_path):
  checkpoints = _open(tmp_path)
  with _largest_file(1 << 20):
    checkpoints.save(20, {"x": jax.random.normal(jax.random.key(0), (500_000,))}, EXTRA)
    with pytest.raises(InputError, match="there is no older one"):
      checkpoints.wait()
  checkpoints.close()
  _save(tmp_path, 20)
  _assert_restores(tmp_path, 20)


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path):
  checkpoints = _open(tmp_path)
  with pytest.raises((TypeError, ValueError)) as caught:
    checkpoints.save(1, {"x": object()}, EXTRA, wait=True)
  assert not isinstance(caught.value, InputError)


def test_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"cannot write checkpoints to .*file") as caught:
    _open(tmp_path / "file" / "run")
  assert not isinstance(caught.value, StorageError)  # the user's to mend


def test_storage_that_is_away_when_a_run_starts(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

  monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
  with pytest.raises(StorageError, match=r"cannot write checkpoints to .*Stale file handle"):
    _open(tmp_path)


@pytest.fixture
def unreadable(monkeypatch):
  """Makes the system refuse, so many times, to read or look at paths that end so."""
  monkeypatch.setattr(checkpoint_files, "_READ_AGAIN", (0.01, 0.01))
  left = {}

  def at(ending, times):
    left[ending] = times

  def refusing(function):
    def read(path, *arguments, **named):
      for ending, times in left.items():
        if str(path).endswith(ending) and times > 0:
          left[ending] -= 1
          raise OSError(errno.EIO, "Input/output error", str(path))
      return function(path, *arguments, **named)
    return read

  for name in ("read_text", "open", "stat"):
    monkeypatch.setattr(pathlib.Path, name, refusing(getattr(pathlib.Path, name)))
  monkeypatch.setattr(checkpoint_files, "read_extra", refusing(checkpoint_files.read_extra))
  return at


_READ = ["10/checksums.json", "20/checksums.json", "20/_CHECKPOINT_METADATA", "10/extra/metadata",
         "20/state/manifest.ocdbt", "20/extra/metadata", "checkpoints/10", "checkpoints/20"]


@pytest.mark.parametrize("file", _READ)
def test_what_cannot_be_read_for_a_moment_is_read_again(tmp_path, unreadable, file):
  directory = _save(tmp_path, 10, 20)
  unreadable(file, 2)
  _assert_restores(tmp_path, 20)
  assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]


@pytest.mark.parametrize("file", _READ)
def test_an_outage_is_no_damage(tmp_path, unreadable, file):
  """Nothing is renamed or deleted, and the run ends as one whose storage fails."""
  directory = _save(tmp_path, 10, 20)
  unreadable(file, 1000)
  with pytest.raises(StorageError, match=r"cannot read .*Input/output error"):
    _open(tmp_path)
  assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]
  unreadable(file, 0)
  _assert_restores(tmp_path, 20)


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
  directory = _save(tmp_path, 10, 20)
  read = pathlib.Path.read_text

  def refuse(path, *arguments, **named):
    if path == directory / "20" / "checksums.json":
      raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return read(path, *arguments, **named)

  monkeypatch.setattr(checkpoint_files, "_READ_AGAIN", ())
  monkeypatch.setattr(pathlib.Path, "read_text", refuse)
  with pytest.raises(InputError, match=r"cannot read .*checksums\.json: Permission denied"):
    _open(tmp_path)
  assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]


@pytest.mark.parametrize("numbers", [{"save_every": 0}, {"save_every": 1, "failures": -1}])
def test_senseless_numbers_are_refused(tmp_path, numbers):
  with pytest.raises(InputError, match="at least 1"):
    checkpoint.Checkpoints(tmp_path, keep=retention.Retention(1), **numbers)


def test_the_last_those_at_a_cadence_and_the_best_stay(tmp_path):
  losses = {10: 0.5, 20: 0.1, 30: None, 40: 0.4, 50: 0.2, 60: 0.3, 70: 0.6}
  keep = retention.Retention(last=1, every=30, best=2)
  for steps in ((10, 20, 30, 40), (50, 60, 70)):  # losses are remembered by the checkpoints
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=keep, save_every=10)
    for step in steps:
      checkpoints.save(step, _state(step), {**EXTRA, "held_out": losses[step]}, wait=True)
    checkpoints.close()
  left = sorted(int(path.name) for path in checkpoints.directory.iterdir())
  assert left == [20, 30, 50, 60, 70]
  assert checkpoint_files.read_extra(checkpoints.directory / "50")["held_out"] == 0.2


@given(losses=st.lists(st.none() | st.floats(0, 1) | st.sampled_from([math.nan, math.inf]),
                       min_size=1, max_size=12),
       last=st.integers(1, 4), every=st.integers(0, 5), best=st.integers(0, 3))
def test_retention_keeps_what_it_says_and_no_more(losses, last, every, best):
  numbered = [(3 * i, loss) for i, loss in enumerate(losses)]
  kept = retention.Retention(last, every, best).stays(numbered)
  stay = [x for x, wanted in zip(numbered, kept, strict=True) if wanted]
  assert stay[-last:] == numbered[-last:]
  finite = lambda some: sorted(x for _, x in some if x is not None and math.isfinite(x))[:best]
  assert finite(stay) == finite(numbered)
  cadence = {step for step, _ in numbered if every and step % every == 0}
  assert cadence <= {step for step, _ in stay}
  assert len(stay) <= last + best + len(cadence)


@pytest.mark.parametrize("numbers", [{"last": 0}, {"last": 1, "every": -1},
                                     {"last": 1, "best": -1}])
def test_senseless_retention_is_refused(numbers):
  with pytest.raises(InputError, match="at least"):
    retention.Retention(**numbers)


@contextlib.contextmanager
def _failing_storage(monkeypatch, times, after=0):
  """So many saves fail while they are being written, after some that do not."""
  done, write = [0], checkpoint.Checkpoints._write_checksums

  def fail(self):
    done[0] += 1
    if after < done[0] <= after + times:
      raise OSError(errno.EIO, "Input/output error")
    write(self)

  monkeypatch.setattr(checkpoint.Checkpoints, "_write_checksums", fail)
  yield


def test_storage_that_fails_for_a_while_costs_the_checkpoints_of_that_while(tmp_path, monkeypatch,
                                                                            caplog):
  with _failing_storage(monkeypatch, times=2):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=retention.Retention(5), save_every=1,
                                         failures=2)
    for step in (1, 2, 3, 4):
      checkpoints.save(step, _state(step), {**EXTRA, "at": step})
      while checkpoints._manager.is_saving_in_progress():
        time.sleep(0.01)
      checkpoints.check()
    assert checkpoints.latest_step() == 4
    checkpoints.close()
  assert caplog.text.count("could not be written") == 2 and "failure 2 of 2" in caplog.text
  _assert_restores(tmp_path, 4)
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["3", "4"]


def test_failed_saves_take_no_room(tmp_path, monkeypatch):
  """Else a full disk would be fuller by every save that is tried."""
  with _failing_storage(monkeypatch, times=1, after=1):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=retention.Retention(1), save_every=1,
                                         failures=2)
    checkpoints.save(1, _state(1), {**EXTRA, "at": 1}, wait=True)
    checkpoints.save(2, _state(2), {**EXTRA, "at": 2})
    checkpoints.wait()
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]
    checkpoints.save(3, _state(3), {**EXTRA, "at": 3}, wait=True)
    checkpoints.close()
  assert [path.name for path in checkpoints.directory.iterdir()] == ["3"]


@pytest.mark.parametrize("gone", ["extra/metadata", "checksums.json", "_CHECKPOINT_METADATA",
                                  "state/_METADATA"])
def test_an_old_checkpoint_that_a_kill_left_half_deleted_goes(tmp_path, gone, warnings):
  checkpoints = _open(tmp_path)
  for step in (10, 20, 30):
    checkpoints.save(step, _state(step), {**EXTRA, "at": step}, wait=True)
  checkpoints.close()
  (checkpoints.directory / "20" / gone).unlink()
  _assert_restores(tmp_path, 30)
  assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["30"]
  assert "deletes what is left of the checkpoint of step 20" in warnings[0]


def test_a_state_from_before_norms_were_followed(tmp_path):
  """Their typical norm is then not known: zero."""
  state = {"params": {"x": jnp.ones(3)}, "ema": {"x": jnp.ones(3)}}
  checkpoints = _open(tmp_path)
  checkpoints.save(1, state, EXTRA, wait=True)
  _, restored = checkpoints.restore(state | {"typical_norm": jnp.float32(7)})
  checkpoints.close()
  assert restored["typical_norm"] == 0
  np.testing.assert_array_equal(restored["params"]["x"], state["params"]["x"])


@pytest.mark.parametrize(("failures", "saved"), [(2, True), (1, False)])
def test_the_last_save_is_tried_again(tmp_path, monkeypatch, failures, saved):
  with _failing_storage(monkeypatch, times=2):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=retention.Retention(1), save_every=1,
                                         failures=failures, retry_seconds=0.01)
    if saved:
      checkpoints.save(7, _state(7), {**EXTRA, "at": 7}, wait=True)
      _assert_restores(tmp_path, 7)
    else:
      with pytest.raises(StorageError, match=r"step 7 could not be written .*Input/output error"):
        checkpoints.save(7, _state(7), EXTRA, wait=True)


def test_a_target_of_other_shapes_names_or_types_is_refused(tmp_path):
  _save(tmp_path, 10)
  checkpoints = _open(tmp_path)
  with pytest.raises(InputError, match=r"proj/kernel is float32\[4, 16\], in the .*\[4, 8\]"):
    checkpoints.restore(_state(0, width=16))
  half = _state(0).replace(params={"proj": {"kernel": jnp.zeros((4, 8), jnp.float16)}})
  with pytest.raises(InputError, match=r"kernel is float16\[4, 8\], in the checkpoint float32"):
    checkpoints.restore(half)
  with pytest.raises(InputError, match=r"params/extra is float32\[\], in the checkpoint absent"):
    checkpoints.restore(_state(0).replace(params={**_state(0).params, "extra": jnp.zeros(())}))
  checkpoints.close()


_RESHARD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from videogpt_jax import checkpoint
from videogpt_jax import retention

assert jax.device_count() == 4
make = lambda shape, names: jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
before, after = make((4,), ("data",)), make((2, 2), ("data", "tensor"))
x = jnp.arange(64.0).reshape(8, 8)
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=retention.Retention(1), save_every=1)
state = {"params": {"x": jax.device_put(x, NamedSharding(before, P("data")))}}
checkpoints.save(1, state, {"config": {"a": 1}}, wait=True)
wanted = NamedSharding(after, P("tensor", "data"))
target = {"params": {"x": jax.ShapeDtypeStruct((8, 8), x.dtype, sharding=wanted)}}
_, state = checkpoints.restore(target)
assert state["params"]["x"].sharding == wanted
assert {s.data.shape for s in state["params"]["x"].addressable_shards} == {(4, 4)}
np.testing.assert_array_equal(state["params"]["x"], x)
checkpoints.close()
"""


def test_restores_on_another_mesh_and_on_fewer_devices(tmp_path):
  process = _start(_RESHARD, str(tmp_path), devices=4)
  errors = process.communicate()[1]
  assert process.returncode == 0, errors
  x = np.arange(64.0).reshape(8, 8)
  checkpoints = _open(tmp_path)  # this process has one device
  _, state = checkpoints.restore({"params": {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}})
  checkpoints.close()
  assert len(state["params"]["x"].devices()) == 1
  np.testing.assert_array_equal(state["params"]["x"], x)
  np.testing.assert_array_equal(checkpoint_files.load_params(tmp_path, "params")[0]["x"], x)


def test_load_params_needs_no_model(tmp_path):
  directory = _save(tmp_path, 10, 20)
  for path in (tmp_path, directory / "20"):
    for which in ("ema", "params"):
      params, config = checkpoint_files.load_params(path, which)
      expected = getattr(_state(20), which)
      assert jax.tree.structure(params) == jax.tree.structure(expected)
      kernel = params["proj"]["kernel"]
      assert isinstance(kernel, np.ndarray) and kernel.dtype == expected["proj"]["kernel"].dtype
      np.testing.assert_array_equal(kernel, expected["proj"]["kernel"])
      assert config == EXTRA["config"]
  np.testing.assert_array_equal(
    checkpoint_files.load_params(directory / "10", "params")[0]["proj"]["kernel"],
    _state(10).params["proj"]["kernel"],
  )


def test_load_params_skips_a_damaged_newest_and_changes_nothing(tmp_path, warnings):
  directory = _save(tmp_path, 10, 20)
  _flip(directory / "20" / "state" / "manifest.ocdbt")
  params, _ = checkpoint_files.load_params(tmp_path, "params")
  np.testing.assert_array_equal(params["proj"]["kernel"], _state(10).params["proj"]["kernel"])
  assert "20" in warnings[0]
  assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]
  with pytest.raises(InputError, match=r"20 is damaged: state/manifest\.ocdbt"):
    checkpoint_files.load_params(directory / "20")


def test_load_params_refuses_what_is_not_there(tmp_path):
  with pytest.raises(InputError, match=r"no checkpoint in .*nowhere"):
    checkpoint_files.load_params(tmp_path / "nowhere")
  (tmp_path / "fresh" / checkpoint_files.FOLDER).mkdir(parents=True)
  with pytest.raises(InputError, match="no whole checkpoint"):
    checkpoint_files.load_params(tmp_path / "fresh")
  _save(tmp_path / "run", 1)
  with pytest.raises(InputError, match="holds no 'weights', only ema, opt_state, params, step"):
    checkpoint_files.load_params(tmp_path / "run", "weights")


def _extra(**changes) -> dict:
  config = {
    "model": {"hidden_size": 128, "dtype": "auto", "attention": "auto", "remat": "none"},
    "codec": {"id": "pixels", "scale": (1.0, 2.0)},
    "train": {"steps": 100},
  }
  for name, value in changes.items():
    section, leaf = name.split("__")
    config[section][leaf] = value
  return {"config": config, "fingerprint": "f1"}


def test_compare_forbids_another_model_codec_or_data(tmp_path):
  now = _extra()
  for change, words in (
    ({"model__hidden_size": 256}, "config.model.hidden_size is 128, in the checkpoint 256"),
    ({"codec__id": "vae"}, "config.codec.id is 'pixels', in the checkpoint 'vae'"),
  ):
    assert checkpoint.compare(now, _extra(**change)) == [words]
  assert checkpoint.compare(now, {**now, "fingerprint": "f2"}) == [
    "the data has fingerprint f1, in the checkpoint f2"
  ]


def test_compare_allows_what_changes_no_stored_number(tmp_path):
  saved = _extra(
    model__dtype="float32",
    model__attention="xla",
    model__remat="full",
    model__unknown_then=1,
    codec__scale=[1.0, 2.0],  # as JSON gives the tuple back
    train__steps=7,
  )
  assert checkpoint.compare(_extra(), saved) == []
