"""What every benchmark says of itself: the day, the commit, and one JSON object at the end."""

from collections.abc import Mapping
import datetime
import json
import pathlib
import subprocess
from typing import Any

from videogpt_jax import files

RESULTS = pathlib.Path("benchmarks/results")


def finish(result: Mapping[str, Any], out: str, default: str) -> None:
  """Writes a result with date and commit, and prints it as the last line.

  Args:
    result: JSON-able.
    out: file to write; "" the default one, "-" none.
    default: name of the file in benchmarks/results.
  """
  result = {**result, **stamp()}
  if out != "-":
    path = pathlib.Path(out or RESULTS / default)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, result)
    print(f"wrote {path}")
  print(json.dumps(result))


def stamp() -> dict[str, str]:
  """Day and commit."""
  return {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": _commit()}


def _commit() -> str:
  """The commit, with "-dirty" behind it if anything but results differs from it."""
  commit, changed = (
    subprocess.run(["git", *command], capture_output=True, text=True, check=False).stdout.strip()
    for command in (["rev-parse", "--short", "HEAD"],
                    ["status", "--porcelain", "--untracked-files=no", "--", ":/",
                     ":(exclude,top)benchmarks/results"]))
  return (commit or "unknown") + ("-dirty" if changed else "")
