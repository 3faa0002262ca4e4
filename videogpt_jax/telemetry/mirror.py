"""The same metrics on Weights & Biases, for whoever asks for it (`log.wandb`).

The training never depends on it: what fails after the start is told once, and the mirror is
off until the next start. Without a network, `WANDB_MODE=offline` writes to WORKDIR/wandb, and
`wandb sync` sends that later.
"""

from collections.abc import Iterator, Mapping
import contextlib
import importlib
import pathlib
import secrets
from typing import Any

from absl import logging

from videogpt_jax import files
from videogpt_jax.errors import InputError

ID_FILE = "wandb_id"


def check(project: str) -> None:
  """Raises `InputError` if a project is named and the package is not installed."""
  if project:
    _package()


def _package() -> Any:
  try:
    return importlib.import_module("wandb")
  except ImportError as error:
    raise InputError("config.log.wandb needs Weights & Biases: pip install "
                     "'videogpt_jax[wandb]', or leave it empty") from error


class WeightsAndBiases:
  """A run there, the same one whenever the run in the workdir is resumed.

  Its id stands in WORKDIR/wandb_id. The steps that a resumed run does again are shown twice.

  Args:
    workdir: of the run; it exists.
    project: where the run is shown; made if it is missing.
    name: of the run; "" takes the workdir's.
    settings: shown as its configuration.

  Raises:
    InputError: the package is not installed.
  """

  def __init__(self, workdir: str | pathlib.Path, project: str, name: str,
               settings: Mapping[str, Any]) -> None:
    workdir = pathlib.Path(workdir)
    self._run: Any = None
    self._wandb = _package()
    identity = _identity(workdir)
    with self._safely():
      run = self._wandb.init(project=project, name=name or workdir.absolute().name, id=identity,
                             resume="allow", dir=str(workdir), config=dict(settings))
      # Its own step counter refuses to go back, as a resumed run does.
      run.define_metric("*", step_metric="step")
      self._run = run

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Shows numbers of a step."""
    with self._safely():
      if self._run:
        self._run.log({"step": int(step), **values})

  def picture(self, step: int, name: str, path: pathlib.Path) -> None:
    """Shows a picture, or a GIF."""
    with self._safely():
      if self._run:
        show = self._wandb.Video if path.suffix == ".gif" else self._wandb.Image
        self._run.log({"step": int(step), name: show(str(path))})

  def close(self) -> None:
    """Ends the run there; waits until everything is sent."""
    with self._safely():
      if self._run:
        self._run.finish()
    self._run = None

  @contextlib.contextmanager
  def _safely(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # whatever a service may do, the training goes on
      self._run = None
      logging.warning("Weights & Biases failed and is off until the next start (%s: %s); "
                      "the metrics are in the workdir", type(error).__name__, error)


def _identity(workdir: pathlib.Path) -> str:
  """The run's id there: that of the workdir, or a new one."""
  path = workdir / ID_FILE
  if not path.exists():
    files.replace(path, secrets.token_hex(4).encode())
  return path.read_text().strip()
