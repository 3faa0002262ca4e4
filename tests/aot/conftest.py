"""A compiler for the target at hand, or why there is none."""

import dataclasses
import json
import os
import pathlib

import compiling
import hardware
import pytest


@pytest.fixture(scope="session")
def compilers():
  """The compiler of a target by name; one process at a time."""
  current = {}

  def compiler(name):
    if name not in current:
      for other in current.values():
        other.close()
      current.clear()
      current[name] = compiling.Compiler(hardware.TARGETS[name])
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
  """A function (target's name, program) -> report; skips where the toolchain is missing.

  With VIDEOGPT_AOT=required in the environment it fails instead.
  """
  def run(name, program):
    missing = hardware.missing(hardware.TARGETS[name].platform)
    if missing:
      reason = f"no compiler for {name}: {missing} missing; pip install -e '.[aot]'"
      (pytest.fail if os.environ.get("VIDEOGPT_AOT") == "required" else pytest.skip)(reason)
    report = compilers(name)(program)
    reports.append({"target": name, "program": repr(program), **dataclasses.asdict(report)})
    return report

  return run
