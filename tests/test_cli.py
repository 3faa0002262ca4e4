"""The edge of commands: statuses, starting anew with huge pages."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from videogpt_jax import cli
from videogpt_jax import errors
from videogpt_jax import files
from videogpt_jax import telemetry

_PROGRAM = textwrap.dedent("""
  import os, pathlib
  from absl import flags
  import numpy as np
  from videogpt_jax import cli

  NAME = flags.DEFINE_string("name", "", "")

  def main():
    block = np.ones(64 << 20, np.uint8)
    rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
    huge = next(line.split()[1] for line in rollup.splitlines() if "AnonHugePages" in line)
    print(os.getpid(), NAME.value, int(huge) // 1024, os.environ.get("GLIBC_TUNABLES"))

  print("started")
  cli.run(main, computes=True)
""")


def _run(tmp_path, **environment):
  path = tmp_path / "a command.py"
  path.write_text(_PROGRAM)
  inherited = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
  process = subprocess.Popen([sys.executable, str(path), "--name=a b"], stdout=subprocess.PIPE,
                             text=True, env=inherited | environment)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  *starts, line = out.splitlines()
  number, name, huge = line.rsplit(" ", 1)[0].split(" ", 1)[0], *line.split(" ", 1)[1].rsplit(
    " ", 2)[:2]
  assert int(number) == process.pid and name == "a b"  # the same process, the same arguments
  return len(starts), int(huge)


@pytest.mark.skipif(not cli._grants_huge_pages() or cli._has_accelerator(),
                    reason="this system has no huge pages on demand, or an accelerator")
def test_a_command_that_computes_has_huge_pages(tmp_path):
  starts, huge = _run(tmp_path)
  assert starts == 2 and huge >= 60


def test_the_users_own_setting_is_left_alone(tmp_path):
  assert _run(tmp_path, GLIBC_TUNABLES="")[0] == 1


@pytest.mark.parametrize(("grants", "accelerator"), [(False, False), (True, True)])
def test_nothing_happens_where_it_does_not_help(monkeypatch, grants, accelerator):
  monkeypatch.delenv("GLIBC_TUNABLES")
  monkeypatch.setattr(cli, "_grants_huge_pages", lambda: grants)
  monkeypatch.setattr(cli, "_has_accelerator", lambda: accelerator)
  monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
  cli.use_huge_pages()
  assert "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize(("number", "status"), [
  (errno.EIO, 74), (errno.ENOSPC, 74), (errno.ESTALE, 74), (errno.EDQUOT, 74),
  (errno.ETIMEDOUT, 74), (None, 74), (errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.ENOENT, 2)])
def test_storage_that_fails_has_a_status_of_its_own(capsys, number, status):
  error = OSError("it broke") if number is None else OSError(number, os.strerror(number))

  def main():
    raise errors.refused(f"cannot write x: {error}", error)

  with pytest.raises(SystemExit) as end:
    cli.run(main, ["command"])
  assert end.value.code == status
  said = capsys.readouterr().err
  assert said.startswith("error: cannot write x: ") and said.count("\n") == 1


@pytest.mark.parametrize(("number", "kind"), [
  (errno.ENOSPC, errors.StorageError), (errno.EACCES, errors.InputError)])
def test_what_cannot_be_put_in_its_place(tmp_path, monkeypatch, number, kind):
  """A log that is opened again, too."""
  path = tmp_path / telemetry.METRICS_FILE
  path.write_text('{"step": 1}\n')

  def refuse(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, "replace", refuse)
  for write in (lambda: files.replace(path, b"new"), lambda: telemetry.Writer(tmp_path, 2)):
    with pytest.raises(errors.InputError, match=f"cannot write .*{os.strerror(number)}") as caught:
      write()
    assert type(caught.value) is kind
  assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
  assert path.read_text() == '{"step": 1}\n'
