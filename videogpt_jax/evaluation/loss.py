"""The training loss on the held-out videos of a configuration, of any weights of its model."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
from ml_collections import ConfigDict

from videogpt_jax import config as config_lib
from videogpt_jax import distributed
from videogpt_jax import files
from videogpt_jax import held_out
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import train
from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import report as report_lib

LOSSES, PLOT = "loss.json", "loss.png"


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured.

  Attributes:
    config: says the data, the frames and clips of a sample, and how many batches.
    checkpoints: workdirs, checkpoints or weights folders, of one model.
    restart: forget what another evaluation left.
  """

  config: ConfigDict
  checkpoints: tuple[str, ...]
  restart: bool = False


def define_flags() -> None:
  """The flags of this benchmark alone."""
  config_flags.DEFINE_config_file("config", None, "The experiment whose held-out videos are taken.",
                                  lock_config=True)


def from_flags() -> Options:
  """The options that the flags say. Raises `InputError` if some are missing."""
  f = flags.FLAGS
  if f.config is None or not f.checkpoint:
    raise InputError("--benchmark=loss needs --checkpoint and, for the held-out videos, --config")
  return Options(f.config, tuple(path for path in f.checkpoint.split(",") if path), f.restart)


def held_out_loss(config: ConfigDict, checkpoints: Sequence[str],
                  ledger: ledger_lib.Ledger | None = None) -> dict[str, dict[str, float]]:
  """The loss of any weights on the held-out videos of a configuration.

  Args:
    config: says the data, the frames and clips of a sample, and how many batches.
    checkpoints: workdirs, checkpoints or weights folders, of one model.
    ledger: of the losses that are known.

  Returns:
    By checkpoint: `loss`, `loss_by_noise/I` (time from noise to clean in equal bins) and
    `loss_by_clip/I`.

  Raises:
    InputError: bad configuration or data, or weights of another model.
  """
  config_lib.validate(config)
  _, videos = train.open_data(config)
  config = ConfigDict(config)
  config.lora.rank = 0  # adapters are merged when they are read
  recipe, mesh = config_lib.recipe(config), sharding.make_mesh(config.mesh)
  train.check_devices(config, mesh)
  wanted = step_lib.abstract_state(recipe, mesh).params
  loss = held_out.Loss(config, recipe, mesh, videos)
  losses = {}
  with sharding.use(mesh):
    for path in checkpoints:
      params = train.initial_params(path, recipe, wanted)
      # A workdir whose training has gone on has other parameters, and another loss.
      item = f"{path} {weights_lib.fingerprint(params)}"
      # All processes hear the same, or some would wait for the others to compute.
      known = distributed.from_first(functools.partial(ledger.get, item)) if ledger else None
      losses[path] = known or loss(params)
      if ledger and not known and jax.process_index() == 0:
        ledger.put(item, losses[path])
  return losses


def run(out: pathlib.Path, options: Options) -> report_lib.Report:
  """Measures the losses and writes loss.json and loss.png; all processes do so together.

  Raises:
    InputError: see `held_out_loss`; or other results are in the folder.
  """
  settings = options.config.to_dict()
  ledger = ledger_lib.Ledger(out, {"benchmark": "loss", "config": settings},
                             restart=options.restart,
                             outputs=(LOSSES, PLOT, *report_lib.OUTPUTS))
  losses = held_out_loss(options.config, options.checkpoints, ledger)
  if jax.process_index() == 0:
    files.write_json(out / LOSSES, {"config": settings, "held_out": losses})
    telemetry.plot_held_out(losses, out / PLOT)
  return _report(losses, settings)


def _report(losses: dict[str, dict[str, float]], settings: dict[str, Any]) -> report_lib.Report:
  tables = [report_lib.Table("Held-out loss", ["checkpoint", "loss"],
                             [[name, values["loss"]] for name, values in losses.items()],
                             better={"loss": report_lib.LOWER}, digits=6)]
  plots = []
  for kind, title, label in (
      ("noise", "Held-out loss by noise level", "noise level, 0 the noisiest"),
      ("clip", "Held-out loss by clip index", "clip index, the last all later ones")):
    prefix = f"loss_by_{kind}/"
    bins = sorted({int(key.removeprefix(prefix)) for values in losses.values() for key in values
                   if key.startswith(prefix)})
    curves = {name: [values.get(f"{prefix}{i}") for i in bins] for name, values in losses.items()}
    tables.append(report_lib.Table(
      title, [label.split(",", maxsplit=1)[0], *losses],
      [[str(i), *(curve[j] for curve in curves.values())] for j, i in enumerate(bins)],
      across=report_lib.LOWER if len(losses) > 1 else ""))
    plots.append(report_lib.Plot(title, bins, curves, label, "loss"))
  return report_lib.Report("Held-out loss", {"checkpoints": list(losses), "config": settings},
                           tables, plots, summary={n: v["loss"] for n, v in losses.items()})
