"""Several processes as one machine: how they find each other, and what they decide together.

A run on a pod or a cluster is the same command in every process. `initialize` comes before
anything else asks jax for devices; from then on jax's devices are those of all processes.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import signal
import sys
from typing import Any, NamedTuple

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

from videogpt_jax import cli
from videogpt_jax import errors
from videogpt_jax.errors import InputError
from videogpt_jax.errors import StorageError

_CONNECT_S = 300  # until all processes must have come
_MESSAGE_BYTES = 4096


def initialize(coordinator: str = "", num_processes: int | None = None,
               process_id: int | None = None, *, otherwise: str = "give "
               "--coordinator=HOST:PORT --num_processes=N --process_id=I") -> None:
  """Joins the other processes.

  Without arguments the environment says who they are: a TPU pod, SLURM, Kubernetes, Open MPI,
  and whatever else `jax.distributed` knows.

  Args:
    coordinator: HOST:PORT of process 0, as all processes see it.
    num_processes: how many there are.
    process_id: this one's number, from 0.
    otherwise: what to do on a cluster that jax does not know.

  Raises:
    InputError: only some of the arguments are given, or the environment names no cluster.
    RuntimeError: the others do not come; they may the next time.
  """
  given = (coordinator or None, num_processes, process_id)
  if any(x is not None for x in given) and None in given:
    raise InputError("--coordinator, --num_processes and --process_id belong together: give all "
                     "three, or --distributed alone, if the environment says them")
  if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
    raise InputError(f"--process_id={process_id} is not between 0 and --num_processes="
                     f"{num_processes} less one")
  try:
    jax.distributed.initialize(
      coordinator or None, num_processes, process_id, initialization_timeout=_CONNECT_S,
      cluster_detection_method="deactivate" if coordinator else None)
  except ValueError as error:
    raise InputError(f"--distributed: {error}; on a cluster that jax does not know, {otherwise}"
                     ) from error


def define_flags() -> None:
  """The flags that `obey_flags` reads."""
  flags.DEFINE_bool("distributed", False, "One of several processes, as the environment says (TPU "
                    "pods, SLURM, Kubernetes). Every process runs the same command.")
  flags.DEFINE_string("coordinator", "", "Where the environment says nothing: HOST:PORT of "
                      "process 0.")
  flags.DEFINE_integer("num_processes", None, "How many processes there are.")
  flags.DEFINE_integer("process_id", None, "The number of this one, from 0.")


def obey_flags() -> None:
  """Joins the other processes if the flags say so; then process 0 alone prints to stdout.

  Raises:
    InputError, RuntimeError: see `initialize`.
  """
  f = flags.FLAGS
  if not (f.distributed or f.coordinator or f.num_processes is not None
          or f.process_id is not None):
    return
  initialize(f.coordinator, f.num_processes, f.process_id)
  if jax.process_index():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives


def from_first(function: Callable[[], Any]) -> Any:
  """What `function` returns in process 0, alone to call it, for all processes.

  Args:
    function: returns something JSON-able and short.

  Raises:
    InputError, StorageError: the function raised one, or an `OSError`; everywhere.
  """
  if jax.process_count() == 1:
    return function()
  said: dict[str, Any] = {}
  if jax.process_index() == 0:
    try:
      said = {"value": function()}
    except (InputError, OSError) as error:  # whatever it is, the others wait for an answer
      if isinstance(error, OSError):
        error = errors.refused(str(error), error)
      said = {"error": str(error)[:_MESSAGE_BYTES // 4], "later": isinstance(error, StorageError)}
  text = json.dumps(said).encode().ljust(_MESSAGE_BYTES)
  heard = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
  said = json.loads(np.asarray(heard).tobytes())
  if "error" in said:
    raise (StorageError if said["later"] else InputError)(said["error"])
  return said["value"]


def everywhere(x: jax.Array) -> jax.Array | np.ndarray:
  """An array of which every process has all; numpy where it was spread over processes."""
  if x.is_fully_addressable:
    return x
  return multihost_utils.process_allgather(x, tiled=True)


def smallest(number: int) -> int:
  """The smallest of the numbers that the processes call this with."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.int32(number)).min())


def as_first(x: np.ndarray) -> np.ndarray:
  """The array of process 0, for all; those of the others may differ in their last bits."""
  if jax.process_count() == 1:
    return x
  return np.asarray(multihost_utils.broadcast_one_to_all(x))


class Stop(NamedTuple):
  """When to stop.

  Attributes:
    after: to be called once before every step, with the number of finished steps; whether all
      processes stop now.
    pending: whether this process, being the only one, has been told to and need not finish what
      it waits for. Always false of several, which have to agree on a step first.
  """

  after: Callable[[int], bool]
  pending: Callable[[], bool]


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
  """Turns SIGTERM and Ctrl-C, in any process, into an end after the same step in all of them.

  Yields what says when.
  """
  if jax.process_count() == 1:
    with cli.stop_signal() as event:
      yield Stop(lambda step: event.is_set(), event.is_set)
    return

  def interrupted(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, previous)
    os.kill(os.getpid(), signal.SIGTERM)

  # Of SIGTERM jax's coordination service takes care: all agree on a step that none has begun.
  previous = signal.signal(signal.SIGINT, interrupted)
  try:
    yield Stop(multihost_utils.reached_preemption_sync_point, lambda: False)
  finally:
    signal.signal(signal.SIGINT, previous)
