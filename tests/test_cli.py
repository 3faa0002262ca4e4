"""The edge of commands: starting anew with huge pages."""

import os
import subprocess
import sys
import textwrap

import pytest

from videogpt_jax import cli

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
