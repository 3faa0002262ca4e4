"""The ledger: what is finished stays finished, and belongs to one evaluation alone."""

import json
import os

import numpy as np
import pytest

import processes
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import ledger as ledger_lib

IDENTITY = {"checkpoint": "runs/a", "parameters": "0123", "sizes": (1, 2)}
NAMES = ["a", "take-1/left view", "ä%2F", "x" * 300, "x" * 299 + "y", "../../out"]


def test_results_outlive_the_ledger(tmp_path):
  ledger = ledger_lib.Ledger(tmp_path / "out", IDENTITY)
  assert ledger.mine(NAMES) == NAMES
  for i, name in enumerate(NAMES[:-1]):
    ledger.put(name, {"value": np.float32(i), "list": np.arange(2), "nan": float("nan")})
  again = ledger_lib.Ledger(tmp_path / "out", IDENTITY)
  assert again.mine(NAMES) == NAMES[-1:]
  assert again.get(NAMES[-1]) is None
  assert [again.get(name)["value"] for name in NAMES[:-1]] == [0, 1, 2, 3, 4]
  assert again.get("a")["list"] == [0, 1]
  assert np.isnan(again.get("a")["nan"])
  again.put(NAMES[-1], {})
  assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # no name leads out of it
  assert list(again.all(NAMES)) == NAMES


def test_an_item_made_of_other_files_is_unfinished(tmp_path):
  ledger = ledger_lib.Ledger(tmp_path, IDENTITY)
  states = {"a": "old", "b": "old", "c": ""}
  assert ledger.mine(states) == ["a", "b", "c"]
  for item, state in states.items():
    ledger.put(item, {"value": 1}, state)
  assert ledger.mine(states) == []
  assert ledger.mine({**states, "b": "new"}) == ["b"]
  assert ledger.mine({**states, "b": ""}) == ["b"]
  assert ledger.all(["a", "b"]) == {"a": {"value": 1}, "b": {"value": 1}}


def test_other_results_are_refused_unless_told(tmp_path):
  ledger_lib.Ledger(tmp_path, IDENTITY).put("a", {"value": 1})
  other = IDENTITY | {"parameters": "4567"}
  with pytest.raises(InputError, match=r"parameters 0123 \(now 4567\); take another --out, or give "
                                       "--restart"):
    ledger_lib.Ledger(tmp_path, other)
  with pytest.raises(InputError, match=r"seed None \(now 1\)"):
    ledger_lib.Ledger(tmp_path, IDENTITY | {"seed": 1})
  assert ledger_lib.Ledger(tmp_path, IDENTITY).get("a") == {"value": 1}
  assert ledger_lib.Ledger(tmp_path, other, restart=True).get("a") is None
  with pytest.raises(InputError, match="parameters 4567"):
    ledger_lib.Ledger(tmp_path, IDENTITY)


OUTPUTS = {"outputs": ("made", "table.csv", "theirs")}


def _evaluated(folder):
  """An evaluation in a folder in which somebody's things are already."""
  for name in ("theirs/own.txt", "items/own.txt", "more/own.txt"):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("own")
  ledger_lib.Ledger(folder, IDENTITY, **OUTPUTS).put("a", {"value": 1})
  (folder / "made" / "deep").mkdir(parents=True)
  for name in ("made/deep/left.mp4", "table.csv", "theirs/0.mp4"):
    (folder / name).write_text("left")


def _files(folder):
  return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_restart_removes_what_the_evaluation_made_and_nothing_else(tmp_path):
  _evaluated(tmp_path)
  owned = {"theirs/own.txt", "items/own.txt", "more/own.txt", "theirs/0.mp4"}
  assert _files(tmp_path) == owned | {"items/a.json", "made/deep/left.mp4", "table.csv",
                                      ledger_lib.IDENTITY}
  ledger_lib.Ledger(tmp_path, IDENTITY, **OUTPUTS)  # goes on: nothing is lost, nothing forgotten
  assert "made/deep/left.mp4" in _files(tmp_path)
  ledger_lib.Ledger(tmp_path, IDENTITY | {"seed": 1}, restart=True, outputs=["other"])
  assert _files(tmp_path) == owned | {ledger_lib.IDENTITY}
  assert not (tmp_path / "made").exists()


def test_a_record_leads_nowhere_else(tmp_path):
  outside, out = tmp_path / "outside", tmp_path / "out"
  for folder in (outside, out):
    folder.mkdir()
  (outside / "own.txt").write_text("own")
  ledger_lib.Ledger(out, IDENTITY, outputs=("link",))
  (out / "link").symlink_to(outside)
  identity = json.loads((out / ledger_lib.IDENTITY).read_text())
  assert identity["outputs"] == ["link"]
  identity["outputs"] += ["../outside", "..", "", ".", str(outside)]
  (out / ledger_lib.IDENTITY).write_text(json.dumps(identity))
  ledger_lib.Ledger(out, IDENTITY, restart=True)
  assert _files(outside) == {"own.txt"}
  assert not (out / "link").is_symlink()


def test_an_evaluation_may_want_its_outputs_for_itself(tmp_path):
  _evaluated(tmp_path)
  before = _files(tmp_path)
  for restart in (False, True):
    with pytest.raises(InputError, match="holds theirs, which no evaluation recorded"):
      ledger_lib.Ledger(tmp_path, IDENTITY, restart=restart, **OUTPUTS, exclusive=True)
  assert _files(tmp_path) == before
  (tmp_path / "theirs").rename(tmp_path / "away")
  ledger_lib.Ledger(tmp_path, IDENTITY, **OUTPUTS, exclusive=True)


def test_restart_spares_what_is_to_be_read(tmp_path):
  _evaluated(tmp_path)
  before = _files(tmp_path)
  for place in ("made", "made/deep"):
    with pytest.raises(InputError, match=r"--restart would remove .*made, which is to be read"):
      ledger_lib.Ledger(tmp_path, IDENTITY, restart=True, inputs=["", str(tmp_path / place)])
  assert _files(tmp_path) == before
  ledger_lib.Ledger(tmp_path, IDENTITY, restart=True, inputs=["", str(tmp_path / "theirs")])


def test_damage_and_places_that_cannot_be_written(tmp_path):
  ledger = ledger_lib.Ledger(tmp_path / "out", IDENTITY)
  ledger.put("a", {"value": 1})
  (tmp_path / "out" / "items" / "a.json").write_text('{"val')  # the machine went down
  assert ledger.mine(["a"]) == ["a"]
  with pytest.raises(InputError, match="lacks 1 of 1 results, such as a;"):
    ledger.all(["a"])
  (tmp_path / "out" / ledger_lib.IDENTITY).write_text("{")
  with pytest.raises(InputError, match="is damaged; give --restart"):
    ledger_lib.Ledger(tmp_path / "out", IDENTITY)
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write to"):
    ledger_lib.Ledger(tmp_path / "file", IDENTITY)


_WORKER = """
import pathlib, sys
from absl import flags
from videogpt_jax import distributed
from videogpt_jax.evaluation import ledger
distributed.define_flags()
flags.FLAGS(["worker"] + sys.argv[2:])
said = sys.stdout
distributed.obey_flags()
book = ledger.Ledger(pathlib.Path(sys.argv[1]), {"checkpoint": "runs/a"})
names = [str(i) for i in range(7)]
mine = book.mine(names)
for name in mine:
  book.put(name, {"value": int(name) ** 2})
found = book.all(names)
print(",".join(mine), sum(values["value"] for values in found.values()), file=said)
"""


def test_processes_share_the_work(tmp_path):
  """Each does its part of what is left; all see all."""
  ledger_lib.Ledger(tmp_path, {"checkpoint": "runs/a"}).put("2", {"value": 4})
  said = processes.finish(processes.start(["-c", _WORKER, tmp_path], processes=2, devices=1))
  last = [lines.splitlines()[-1].split() for lines in said]
  shares = [share.split(",") for share, _ in last]
  assert shares == [["0", "3", "5"], ["1", "4", "6"]]
  assert [int(total) for _, total in last] == [91, 91]
  assert json.loads((tmp_path / ledger_lib.IDENTITY).read_text())["checkpoint"] == "runs/a"
  assert len(os.listdir(tmp_path / "items")) == 7
