"""Settings that make no sense are refused in one line: what is wrong, where, what would do."""

import subprocess

from ml_collections import ConfigDict
import pytest

import tiny_run
from videogpt_jax import config as config_lib
from videogpt_jax import train
from videogpt_jax.data import world
from videogpt_jax.errors import InputError


def _set(config, name, value):
  *sections, leaf = name.split(".")
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[leaf] = value


# The command line and the file ------------------------------------------------------------


@pytest.mark.parametrize(("argument", "message"), [
  ("--config.train.stepz=3", 'Did you mean "steps" instead of "stepz"?'),
  ("--config.optimizer.learning_rate=fast", "could not convert string to float: 'fast'"),
  ("--config.data.interval=1,2,3", "config.data.interval must be (lo, hi), got (1, 2, 3)"),
  ("--config.platform=abacus", "config.platform is 'abacus'"),
])
def test_the_command_refuses_an_argument(tiny_data, tmp_path, argument, message):
  file = tiny_run.config_file(tiny_run.config(tiny_data), tmp_path / "config.py")
  result = tiny_run.run("main", f"--config={file}", f"--workdir={tmp_path / 'run'}", argument)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr
  assert result.stderr.startswith("error: ")
  assert result.stdout == ""
  assert not (tmp_path / "run").exists()


_OVERRIDE = """
import sys
from ml_collections import config_flags
from videogpt_jax import cli
from videogpt_jax import config

flag = config_flags.DEFINE_config_file("config", None, "")

def main():
  config.validate(flag.value)
  print(*(repr(config.leaf(flag.value, name)) for name in (
    "data.interval", "clips.lengths", "optimizer.learning_rate", "train.steps", "world.occluder",
    "world.shapes")), sep=";")

cli.run(main)
"""


def test_every_kind_of_leaf_can_be_overridden(tmp_path):
  file = tiny_run.config_file(tiny_run.config(tmp_path), tmp_path / "config.py")
  result = subprocess.run(
    [tiny_run.sys.executable, "-c", _OVERRIDE, f"--config={file}", "--config.data.interval=2,5",
     "--config.clips.lengths=(1, 3)", "--config.clips.partition=fixed",
     "--config.optimizer.learning_rate=1e-2", "--config.train.steps=5",
     "--config.world.occluder=true", "--config.world.shapes=('box',)"],
    capture_output=True, text=True, timeout=100, check=False)
  assert result.stdout.strip() == "(2, 5);(1, 3);0.01;5;True;('box',)", result.stderr


def test_the_default_and_the_shipped_configurations_are_valid():
  config_lib.validate(config_lib.default())
  for name in ("tiny", "world"):
    module = {}
    path = tiny_run.pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py"
    exec(compile(path.read_text(), path, "exec"), module)
    config_lib.validate(module["get_config"]())


def test_what_a_file_adds_forgets_or_mistypes():
  config = config_lib.default()
  config.train.stepz = 3
  with pytest.raises(InputError, match=r"config\.train\.stepz does not.*config\.train\.steps"):
    config_lib.validate(config)
  config = config_lib.default()
  del config.train["steps"]
  with pytest.raises(InputError, match=r"config\.train\.steps is missing; start from .*default"):
    config_lib.validate(config)
  with pytest.raises(InputError, match=r"config\.\w+.* is missing"):
    config_lib.validate(ConfigDict({}))


@pytest.mark.parametrize(("name", "value", "message"), [
  ("optimizer.learning_rate", "1e-3", "must be a number, got '1e-3'"),
  ("train.steps", 10.5, "must be a whole number"),
  ("train.steps", "10", "must be a whole number"),
  ("data.path", None, "must be text"),
  ("world.occluder", 1, "must be True or False"),
  ("data.interval", 4, "must be a tuple like"),
  ("data.interval", ("a", "b"), "must be a tuple like"),
  ("world.shapes", (1,), "must be a tuple like"),
])
def test_a_value_of_another_type(name, value, message):
  config = config_lib.default()
  _set(config, name, value)
  with pytest.raises(InputError, match=f"config.{name} {message}"):
    config_lib.validate(config)


def test_whole_numbers_and_lists_do_for_numbers_and_tuples():
  config = config_lib.default()
  _set(config, "optimizer.learning_rate", 0)
  _set(config, "data.interval", [1, 2])
  config_lib.validate(config)


# Values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
  ({"train.steps": 0}, r"config\.train\.steps must be positive, got 0"),
  ({"optimizer.learning_rate": -1e-3}, r"learning_rate must be at least 0, got -0\.001"),
  ({"optimizer.learning_rate": float("nan")}, r"learning_rate must be at least 0, got nan"),
  ({"model.hidden_size": 100, "model.num_heads": 3},
   r"config\.model: hidden_size 100 is not divisible by num_heads 3"),
  ({"optimizer.name": "sgd"}, r"config\.optimizer\.name is 'sgd'; known: adamw, muon"),
  ({"sample.history_noise": 1.0}, r"config\.sample\.history_noise must be in \[0, 1\), got 1\.0"),
  ({"train.watchdog": -1.0}, r"config\.train\.watchdog must be at least 0, got -1\.0"),
  ({"train.watchdog_action": "pray"}, r"watchdog_action is 'pray'; known: auto, report, abort"),
  ({"log.profile_steps": 0}, r"config\.log\.profile_steps must be positive, got 0"),
  ({"model.num_kv_heads": 3}, r"num_heads 4 is not divisible by num_kv_heads 3"),
  ({"model.hidden_size": 20, "model.num_heads": 4}, r"hidden_size 20 must be a multiple of 4"),
  ({"model.patch_size": 3}, r"64x64 px do not divide into latent cells of 2 px and patches of 3x3"),
  ({"data.width": 65}, r"64x65 px do not divide into latent cells of 2 px"),
  ({"model.diff_id": 4}, r"config\.model\.diff_id 4 is no row of a vocabulary of 4"),
  ({"model.attention": "fast"}, r"config\.model\.attention is 'fast'; known: auto, .*reference"),
  ({"model.remat": "some"}, r"config\.model\.remat is 'some'; known: .*none"),
  ({"model.dtype": "float64"}, r"config\.model\.dtype is 'float64'; known: .*float32"),
  ({"codec.id": "jpeg"}, r"unknown codec 'jpeg'; known: .*pixels"),
  ({"clips.partition": "none"}, r"config\.clips\.partition is 'none'; known: random"),
  ({"clips.partition": "fixed", "clips.lengths": (4, 4)}, r"sum to 8, config\.data\.frames is 16"),
  ({"clips.partition": "continuation", "sample.history": 16}, r"leaves nothing to predict"),
  ({"clips.beta": 1.5}, r"config\.clips\.beta must be in \[0, 1\]"),
  ({"data.frames": 1}, r"random partitions need at least 2 frames"),
  ({"sample.clip_frames": 17}, r"clip_frames 17 does not fit the window of 16 frames"),
  ({"train.batch_size": 10, "train.accumulation": 4}, r"10 does not divide .* 4 microbatches"),
  ({"train.ema_decay": 1.0}, r"config\.train\.ema_decay must be in \[0, 1\)"),
])
def test_values_that_make_no_sense(settings, message):
  config = config_lib.default()
  for name, value in settings.items():
    _set(config, name, value)
  with pytest.raises(InputError, match=message):
    config_lib.validate(config)


# Settings that do not fit the data or the machine -----------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
  ({"data.frames": 7}, r"no usable video: 7 frames at interval 1 need 7 stored frames .* all 24 "
   r"records are shorter \(24 have 6 frames\)"),
  ({"data.interval": (2, 2)}, r"no usable video: 4 frames at interval 2 need 7 stored frames"),
  ({"data.height": 32, "data.width": 32}, r"holds frames of 16x16 px.*asks for 32x32 px"),
  ({"codec.block": 2}, r"holds latents of codec .*'block': 4.*'block': 2.*encode again"),
  ({"data.posterior": "separate"}, r"data set .* holds means alone"),
  ({"data.mixture": "a=1,b"}, r"give every data set a weight"),
  ({"data.mixture": "a=much"}, r"the weight of 'a=much' is no number"),
  ({"data.min_bucket": 25}, r"no size of frames has 25 usable records.*holds 24"),
  ({"data.path": ""}, r"config\.data\.path is empty: name the folder that `encode` wrote"),
  ({"data.path": "/not/there"}, r"/not/there"),
  ({"mesh.data": 3}, r"data=3 .* needs 3 devices, there are 1"),
])
def test_settings_that_do_not_fit(tiny, tmp_path, settings, message):
  for name, value in settings.items():
    _set(tiny, name, value)
  with pytest.raises(InputError, match=message):
    train.train(tiny, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_an_interval_that_is_no_multiple_of_the_stride(tmp_path):
  config = tiny_run.config(tmp_path / "data")
  config.data.source, config.data.videos = "videos", str(tmp_path / "videos")
  (tmp_path / "videos").mkdir()
  world.write_videos(world.Settings(**config.world), tmp_path / "videos", range(6))
  config.data.stride, config.data.frames, config.data.interval = 2, 2, (2, 4)
  config.data.validation_fraction = 0.5
  tiny_run.encode.encode(config, processes=1)
  config.data.interval = (3, 3)
  with pytest.raises(InputError, match=r"\(3, 3\) has no multiple of the stored stride 2; choose"):
    train.train(config, str(tmp_path / "run"))


def test_a_workdir_that_cannot_be_written(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=f"cannot write checkpoints to {tmp_path}/file/run"):
    train.train(tiny, str(tmp_path / "file" / "run"))


def test_a_saved_configuration_of_another_version_still_opens():
  saved = config_lib.default().to_dict()
  saved["data"]["interval"] = [2, 3]  # JSON has no tuples
  saved["train"]["forgotten"] = saved["gone"] = {"x": 1}
  del saved["sample"]["shift"]
  config = config_lib.from_saved(saved)
  config_lib.validate(config)
  assert config.data.interval == (2, 3)
  assert config.sample.shift == config_lib.default().sample.shift
