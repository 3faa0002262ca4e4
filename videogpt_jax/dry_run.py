"""What a configuration would cost, before anything expensive: the text of `main --dry_run`."""

from collections.abc import Iterator

from flax import traverse_util
import jax
from ml_collections import ConfigDict
import psutil

from videogpt_jax.aot import chips
from videogpt_jax.aot import estimate
from videogpt_jax.aot import facts as facts_lib
from videogpt_jax.aot import topology as topology_lib

# Of a GPU's memory jax takes so much when it starts, or what XLA_PYTHON_CLIENT_MEM_FRACTION says.
_GPU_SHARE = 0.75
_GPU_MOST = 0.92
_TPU_SHARE = 0.98  # the compilers keep some for themselves
_LESS_MEMORY = (
  "a larger config.train.accumulation (fewer videos at once), config.model.remat=full, a larger "
  "config.mesh.fsdp (state) or sequence and tensor (activations), config.train.offload, or a "
  "smaller config.train.batch_size")


def report(config: ConfigDict, topology: str = "") -> str:
  """Resolved configuration, parameters by part, FLOPs, memory, traffic and an estimated time.

  The train step is compiled, so the memory is the compiler's own figure; nothing is
  allocated and no data is read.

  Args:
    config: valid configuration.
    topology: name of the devices to compile for, see `videogpt_jax.aot.topology`; "": those
      there are.

  Raises:
    InputError: an unknown topology, no compiler for it, or a mesh that does not suit it.
  """
  if topology:
    parsed = topology_lib.parse(topology)
    facts, chip = facts_lib.of_topology(config, parsed), parsed.chip
  else:
    facts = facts_lib.of_devices(config, jax.devices())
    chip = _present(facts.device)
  leaves = traverse_util.flatten_dict(config.to_dict(), sep=".")
  return "\n".join([
    "resolved configuration:", *(f"  --config.{name}={value}" for name, value in leaves.items()),
    *_work(facts), *_memory(facts, chip), *_unseen(config, chip, topology), *_traffic(facts),
    *_time(facts, chip),
    f"traced and compiled in {facts.compile_seconds:.0f} s"])


def fits(facts: facts_lib.Facts, chip: chips.Chip) -> tuple[bool, str]:
  """Whether a step's memory is there on a device, and in words how much is."""
  total, devices = facts.memory.total, len(facts.places)
  if chip.platform == "cpu":  # devices share the memory of the machine
    here = psutil.virtual_memory().total
    return total * devices <= here, f"{devices} devices, {_size(here)} of memory in this machine"
  if not chip.memory:
    return True, "capacity unknown"
  if chip.platform == "tpu":
    return total <= _TPU_SHARE * chip.memory, f"of {_size(chip.memory)}"
  words = f"of {_size(chip.memory)}, of which jax takes {_GPU_SHARE:.0%} by default"
  if _GPU_SHARE * chip.memory < total <= _GPU_MOST * chip.memory:
    return True, f"{words}: set XLA_PYTHON_CLIENT_MEM_FRACTION={_GPU_MOST}"
  return total <= _GPU_MOST * chip.memory, words


def _present(kind: str) -> chips.Chip:
  """The kind of chip that the present devices are; one without figures, if unknown."""
  names = {"TPU v6 lite": "v6e", "TPU v5 lite": "v5e", "TPU v5": "v5p", "H100 80GB": "h100",
           " H200": "h200", "L4": "l4"}
  name = next((name for part, name in names.items() if part in kind and "L40" not in kind), None)
  if name is not None:
    return chips.CHIPS[name]
  backend = jax.default_backend()
  return chips.Chip(kind, {"gpu": "cuda"}.get(backend, backend), "auto")


def _work(facts: facts_lib.Facts) -> Iterator[str]:
  cost = facts.cost
  yield "parameters:"
  yield from (f"  {name:<12}{count:>16,}" for name, count in facts.parameters.items())
  yield "a step:"
  yield f"  needed tokens       {cost.tokens:,.0f}"
  yield f"  FLOPs, dense        {cost.dense:.3e}"
  yield f"  FLOPs, attention    {cost.attention:.3e} (visible pairs only)"
  yield f"  FLOPs, all          {cost.total:.3e}"
  yield f"devices: {len(facts.places)} x {facts.device}, mesh {facts.mesh}"
  yield (f"  each computes {facts.rows} video(s) at once, {facts.accumulation} time(s) a step, of "
         f"latents {'x'.join(map(str, facts.latents))}; attention {facts.attention!r}, "
         f"remat {facts.remat!r}")


def _memory(facts: facts_lib.Facts, chip: chips.Chip) -> Iterator[str]:
  memory, (there, words) = facts.memory, fits(facts, chip)
  yield "memory of a device:"
  if not memory.needed:
    yield f"  state and batch     {_size(memory.arguments)}"
    yield f"  results             {_size(memory.results)}"
    yield f"    in their place    {_size(memory.aliased)}"
    yield f"  temporary           {_size(memory.temporaries)}"
    yield f"  compiled program    {_size(memory.code)}"
    if memory.host:
      yield f"  on the host         {_size(memory.host)} for it"
  yield f"  in all              {_size(memory.total)} {words}"
  yield "  it fits" if there else f"  IT DOES NOT FIT; what takes less: {_LESS_MEMORY}"


def _unseen(config: ConfigDict, chip: chips.Chip, topology: str) -> Iterator[str]:
  if topology and chip.platform == "cuda" and config.train.offload == "optimizer":
    yield ("  (but the moments, half of the state, which config.train.offload puts on the host: "
           "jax does not compile that for GPUs that are not there)")


def _traffic(facts: facts_lib.Facts) -> Iterator[str]:
  traffic = facts.traffic
  if traffic is None:
    return
  yield "traffic of a device and step (loops counted as often as they turn):"
  yield f"  own memory          {_size(traffic.bytes)} (each result written and read once)"
  if traffic.host_bytes:
    yield f"  to and from host    {_size(traffic.host_bytes)}"
  for kind, (count, sent) in traffic.by_kind().items():
    yield f"  {kind:<20}{_size(sent)} sent in {count:,}"
  if not traffic.collectives:
    yield "  no exchange with other devices"
  if traffic.unknown_loops:
    yield f"  {traffic.unknown_loops} loop(s) of unknown length counted once"


def _time(facts: facts_lib.Facts, chip: chips.Chip) -> Iterator[str]:
  found = estimate.of(facts, chip)
  if found is None:
    yield "no estimate of the time: no data sheet of such devices, or no program that fits"
    return
  yield "ESTIMATE of the time, not a measurement:"
  yield (f"  step                {found.shortest:.2f} s if all overlaps, {found.longest:.2f} s if "
         "nothing does")
  yield f"  MFU                 {found.mfu[1]:.0%} to {found.mfu[0]:.0%} (needed FLOPs only)"
  yield (f"  arithmetic          {found.compute:.2f} s at {estimate.PRODUCTS:.0%} of the peak, "
         f"attention at {estimate.ATTENTION:.0%}, recomputation included")
  yield (f"  own memory          {found.memory:.2f} s at {estimate.MEMORY:.0%} of "
         f"{chip.bandwidth / 1e9:,.0f} GB/s")
  yield (f"  exchange            {found.exchange:.2f} s at {estimate.LINKS:.0%} of "
         f"{chip.links / 1e9:,.0f} GB/s to neighbours, {chip.network / 1e9:,.1f} GB/s beyond")


def _size(count: float) -> str:
  """Bytes in the largest unit that leaves at least one before the point."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} TiB"
