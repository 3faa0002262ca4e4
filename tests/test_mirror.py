"""Weights & Biases beside the files, with a stand-in for its package."""

import json
import sys
import types

import numpy as np
import pytest

from videogpt_jax import telemetry
from videogpt_jax import train
from videogpt_jax.errors import InputError
from videogpt_jax.telemetry import mirror


class Service(types.ModuleType):
  """What of the package `wandb` is used; it keeps what it is told, and fails when told to."""

  def __init__(self):
    super().__init__("wandb")
    self.started, self.defined, self.logged, self.finished = [], [], [], 0
    self.failing = set()
    self.Video = lambda path: ("video", path)
    self.Image = lambda path: ("image", path)

  def _fail(self, name):
    if name in self.failing:
      raise RuntimeError(f"{name}: the service is down")

  def init(self, **options):
    self._fail("init")
    self.started.append(options)
    return self

  def define_metric(self, name, step_metric):
    self.defined.append((name, step_metric))

  def log(self, values):
    self._fail("log")
    self.logged.append(values)

  def finish(self):
    self._fail("finish")
    self.finished += 1


@pytest.fixture
def service(monkeypatch):
  stand_in = Service()
  monkeypatch.setitem(sys.modules, "wandb", stand_in)
  return stand_in


def test_what_the_files_get_is_shown_there_too(service, tmp_path):
  writer = telemetry.open_writer(tmp_path, project="worlds", name="tiny", settings={"seed": 1})
  writer.scalars(3, {"loss": np.float32(0.5)})
  video = writer.video(4, "rollout", np.zeros((2, 8, 8, 3), np.uint8), fps=8.0)
  image = writer.image(5, "mask", np.zeros((8, 8, 3), np.uint8))
  writer.close()
  (options,) = service.started
  assert (options["project"], options["name"], options["config"]) == ("worlds", "tiny", {"seed": 1})
  assert options["dir"] == str(tmp_path)
  assert service.logged == [{"step": 3, "loss": 0.5},
                            {"step": 4, "rollout": ("video", str(video))},
                            {"step": 5, "mask": ("image", str(image))}]
  assert service.finished == 1
  assert service.defined == [("*", "step")]  # so that steps done again are taken


def test_a_resumed_run_is_the_same_run_there(service, tmp_path):
  for folder in ("a", "a", "b"):
    telemetry.open_writer(tmp_path / folder, project="worlds").close()
  first, resumed, other = service.started
  assert first["id"] == resumed["id"] != other["id"]
  assert (first["resume"], first["name"], other["name"]) == ("allow", "a", "b")


def test_a_run_does_not_end_with_the_service(service, tiny, tmp_path, caplog):
  tiny.log.wandb, tiny.log.videos, tiny.train.steps = "worlds", 0, 4
  log = service.log

  def log_until_the_network_is_gone(values):
    service.failing |= {"log", "finish"} if values["step"] > 2 else set()
    log(values)

  service.log = log_until_the_network_is_gone
  assert train.train(tiny, str(tmp_path)) == 4
  assert [values["step"] for values in service.logged] == [2]
  assert caplog.text.count("Weights & Biases failed") == 1
  lines = (tmp_path / telemetry.METRICS_FILE).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [2, 4, 4]  # the last: held out


def test_a_service_that_is_down_at_the_start_is_done_without(service, tmp_path, caplog):
  service.failing = {"init"}
  writer = telemetry.open_writer(tmp_path, project="worlds")
  writer.scalars(1, {"loss": 1.0})
  writer.image(1, "mask", np.zeros((8, 8, 3), np.uint8))
  writer.close()
  assert caplog.text.count("Weights & Biases failed") == 1
  assert not service.logged
  assert (tmp_path / telemetry.METRICS_FILE).read_text()


def test_a_missing_package_is_told_before_anything_else(tiny, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  tiny.log.wandb, tiny.data.path = "worlds", "/not/there"
  with pytest.raises(InputError, match=r"config.log.wandb needs .* 'videogpt_jax\[wandb\]'"):
    train.train(tiny, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  mirror.check("")
