"""Trains a model: `python -m videogpt_jax.main --config=configs/tiny.py --workdir=DIR`.

Any leaf of the configuration can be overridden: `--config.train.steps=200`. The same
command again resumes the run in the workdir.
"""

from absl import flags
from ml_collections import config_flags

from videogpt_jax import cli
from videogpt_jax import config as config_lib
from videogpt_jax import distributed
from videogpt_jax import dry_run
from videogpt_jax import files
from videogpt_jax import machine
from videogpt_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, videos.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Show the resolved configuration, parameters, FLOPs and memory; train nothing.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "With --dry_run: compile for these devices, which need not be there: v5p:4x4x4, "
  "h100:8x8 (nodes x GPUs of a node), cpu:8; see docs/scaling.md.")
distributed.define_flags()


def main() -> None:
  """Reads the flags and trains, or reports what would be trained."""
  if _CONFIG.value is None:
    raise InputError("--config is missing, for example --config=configs/tiny.py")
  config = _CONFIG.value
  config_lib.validate(config)
  files.check_local(_WORKDIR.value or "", "--workdir")
  if _TOPOLOGY.value:  # before jax starts: it need not know any accelerator here
    if not _DRY_RUN.value:
      raise InputError("--topology says what --dry_run is to compile for; nothing can run there")
    print(dry_run.report(config, _TOPOLOGY.value))
    return
  if config.cpu_devices:
    machine.split_cpu(config.cpu_devices)
  distributed.obey_flags()
  machine.use_platform(config.platform)
  machine.free_after_compiling()
  if _DRY_RUN.value:
    print(dry_run.report(config))
    return
  if not _WORKDIR.value:
    raise InputError("--workdir is missing, for example --workdir=runs/tiny")
  from videogpt_jax import train  # after the flags: it starts jax and reads data packages

  done = train.train(config, _WORKDIR.value)
  print(f"{done} steps of {config.train.steps} done; the run is in {_WORKDIR.value}")


if __name__ == "__main__":
  cli.run(main, computes=True)
