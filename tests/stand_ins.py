"""Executables that stand in for those of a cluster, for the tests of launch/."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"

# Writes down its arguments and its input; what it does then is up to the test.
_STAND_IN = """#!{python}
import json, os, signal, sys, time
text = "" if sys.stdin.isatty() else sys.stdin.read()
with open({calls!r}, "a") as file:
  file.write(json.dumps([{name!r}, sys.argv[1:], text]) + "\\n")
{action}
"""


class StandIns:
  """Executables that come first on the PATH, and what they were called with."""

  def __init__(self, folder):
    self.folder = folder / "bin"
    self.folder.mkdir()
    self._calls = folder / "calls.jsonl"

  def add(self, name, action="", folder=None):
    path = (folder or self.folder) / name
    path.write_text(_STAND_IN.format(
      python=sys.executable, calls=str(self._calls), name=name, action=action))
    path.chmod(0o755)

  def no_pauses(self):
    """Makes `sleep` return at once; such calls are not written down."""
    (self.folder / "sleep").write_text("#!/bin/sh\n")
    (self.folder / "sleep").chmod(0o755)

  def calls(self):
    """[name, arguments, standard input] of each call."""
    if not self._calls.exists():
      return []
    return [json.loads(line) for line in self._calls.read_text().splitlines()]

  def environment(self, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "VENV"}
    return {**kept, "PATH": f"{self.folder}:{os.environ['PATH']}", **variables}

  def run(self, script, *arguments, **variables):
    return subprocess.run(
      ["bash", str(script), *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True,
      text=True, timeout=300, check=False, cwd=ROOT, env=self.environment(**variables))


def refused(result, *words):
  """Checks that a script says in one line what is wrong, and exits with status 2."""
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
  for word in words:
    assert word in result.stderr
