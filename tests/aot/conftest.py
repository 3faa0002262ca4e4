"""A compiler for the target at hand, or why there is none."""

import dataclasses
import json
import os
import pathlib

import compiling
import pytest

from videogpt_jax.aot import chips
from videogpt_jax.aot import facts
from videogpt_jax.aot import topology


@pytest.fixture(scope="session")
def compilers():
  """The compiler of a target by name; one process at a time."""
  current = {}

  def compiler(name):
    if name not in current:
      for other in current.values():
        other.close()
      current.clear()
      current[name] = compiling.Compiler(name)
    return current[name]

  yield compiler
  for last in current.values():
    last.close()


@pytest.fixture(scope="session")
def reports():
  """What was compiled; written to the JSON file that VIDEOGPT_AOT_REPORT names, if any."""
  lines = []
  yield lines
  if "VIDEOGPT_AOT_REPORT" in os.environ:
    pathlib.Path(os.environ["VIDEOGPT_AOT_REPORT"]).write_text(json.dumps(lines, indent=1) + "\n")


@pytest.fixture
def compile_for(compilers, reports):
  """A function (chip's name, program) -> report; skips where the toolchain is missing.

  With VIDEOGPT_AOT=required in the environment it fails instead.
  """
  def run(name, program):
    _require(name)
    report = compilers(name)(program)
    reports.append({"target": name, "program": repr(program), **dataclasses.asdict(report)})
    return report

  return run


@pytest.fixture
def train_step(reports):
  """A function (topology's name, configuration) -> facts of its train step; skips likewise."""
  def run(name, config):
    where = topology.parse(name)
    _require(where.chip.name)
    found = facts.of_topology(config, where)
    reports.append({"target": name, "program": config.name,
                    **dataclasses.asdict(dataclasses.replace(found, places=()))})
    return found

  return run


def _require(name):
  if missing := topology.missing(chips.CHIPS[name].platform):
    reason = f"no compiler for {name}: {missing} missing; pip install -e '.[aot]'"
    (pytest.fail if os.environ.get("VIDEOGPT_AOT") == "required" else pytest.skip)(reason)
