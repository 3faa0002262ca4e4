"""Speed of a run, and its one line a log point."""

from collections.abc import Callable, Mapping
import math
import time

from videogpt_jax import machine
from videogpt_jax.telemetry import goodput

# Of these the speed is taken; a save or an evaluation is no slowness.
_STEPPING = (goodput.STEP, goodput.DATA_WAIT, goodput.LOST)


class Progress:
  """Speed of a run and its one line a log point.

  Args:
    total_steps: steps of the whole run.
    tokens_per_step: of the global batch.
    flops_per_step: needed work of the global batch; None leaves out the MFU.
    peak_flops: of all devices together, FLOP/s (`machine.peak_flops`); None likewise.
    clock: seconds; another one for tests.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    tokens_per_step: float,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total_steps = total_steps
    self._tokens = tokens_per_step
    self._mfu_at_one_step_per_s = (
      flops_per_step / peak_flops if flops_per_step and peak_flops else None
    )
    self._clock = clock
    self._first = (0, math.inf)

  def start(self, step: int) -> None:
    """Starts the clock of the ETA at `step` finished steps: when compilation is over."""
    self._first = (step, self._clock())

  def update(self, step: int, timed: int, seconds: Mapping[str, float]) -> dict[str, float]:
    """Speed since the last log point, for `step` finished steps.

    Args:
      step: number of finished steps.
      timed: how many of the steps since the last log point the times of stepping are of;
        steps that compiled are not among them.
      seconds: by phase, since the last log point (`goodput.PHASES`).

    Returns:
      `step_s` (absent without a timed step), `steps_per_s`, `tokens_per_s`, `mfu` (0..1;
      absent if unknown), `data_wait` (share of the time of stepping, 0..1), `eta_s`, and
      memory: `host_rss_mib`, and `device_mib` and `device_peak_mib` where known.
    """
    stepping = max(sum(seconds[name] for name in _STEPPING), 1e-9)
    rate = timed / stepping
    speed = {"step_s": 1 / rate} if timed else {}
    speed |= {"steps_per_s": rate, "tokens_per_s": rate * self._tokens}
    if self._mfu_at_one_step_per_s is not None:
      speed["mfu"] = rate * self._mfu_at_one_step_per_s
    speed["data_wait"] = min(seconds[goodput.DATA_WAIT] / stepping, 1.0)
    speed["eta_s"] = self._eta(step)
    return speed | {"host_rss_mib": machine.host_rss_mib()} | machine.device_memory_mib()

  def line(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> str:
    """One greppable line: `values` by name, then `speed` with units.

    Args:
      step: number of finished steps.
      values: shown as they are.
      speed: of `update`; also `checkpoint_s` and `evaluation_s` (shown if not 0) and
        `goodput` (0..1).
    """
    total = self._total_steps
    parts = [f"step {step}/{total} {100 * step / max(total, 1):5.1f}%"]
    parts += [f"{name} {_number(value)}" for name, value in values.items()]
    if "step_s" in speed:
      parts.append(f"{1000 * speed['step_s']:.4g} ms")
    parts.append(f"{speed['tokens_per_s']:.0f} tok/s")
    if "mfu" in speed:
      parts.append(f"mfu {100 * speed['mfu']:.0f}%")
    parts.append(f"wait {100 * speed['data_wait']:.1f}%")
    for name, shown in (("checkpoint_s", "save"), ("evaluation_s", "eval")):
      if speed.get(name, 0) >= 0.05:
        parts.append(f"{shown} {speed[name]:.1f} s")
    if "goodput" in speed:
      parts.append(f"good {100 * speed['goodput']:.0f}%")
    if "device_mib" in speed:
      parts.append(f"device {speed['device_mib']:.0f} (peak {speed['device_peak_mib']:.0f}) MiB")
    parts.append(f"rss {speed['host_rss_mib']:.0f} MiB")
    parts.append(f"eta {duration(speed['eta_s'])}")
    return " | ".join(parts)

  def _eta(self, step: int) -> float:
    """Seconds to the last step; saves and evaluations will come again, so they count."""
    steps, seconds = step - self._first[0], self._clock() - self._first[1]
    if steps <= 0 or seconds <= 0:
      return math.inf
    return (self._total_steps - step) * seconds / steps


def duration(seconds: float) -> str:
  """Seconds as a person reads them: `45s`, `1m20s`, `2h05m`, `3d04h`, or `?` if infinite."""
  if not math.isfinite(seconds):
    return "?"
  whole = max(round(seconds), 0)
  if whole < 60:
    return f"{whole}s"
  if whole < 3600:
    return f"{whole // 60}m{whole % 60:02d}s"
  if whole < 86400:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _number(value: float) -> str:
  """Short and of stable width: plain where that is readable, else an exponent."""
  value = float(value)
  plain = value == 0 or 1e-2 <= abs(value) < 1e5
  return f"{value:.4g}" if plain else f"{value:.2e}"
