"""Reads a compiled program's text: collectives, bytes moved and calls to kernels in one run of it.

What stands in the body of a loop counts as often as the loop turns: a scan over layers is such
a loop. Turns are those that the compiler states (`known_trip_count`), else the constant that the
loop's counter, which begins at zero, is compared with; a loop of another kind counts once, and
is reported as such. Both branches of a condition count. What crosses TPU slices is handed over to
the hosts' network: a `send` that says which collective it is.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# They move nothing by themselves; "-done" ends what "-start" has moved.
_FREE = frozenset((
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
  "conditional", "after-all", "async-start", "partition-id", "replica-id", "opt-barrier", "iota"))
_SLICES = ("dynamic-slice", "dynamic-update-slice")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_MEGASCALE = re.compile(r'_xla_megascale_target="\{(?P<slices>[\d,]+)\}[^"]*",'
                        r'_xla_megascale_transfer_type="(?P<kind>\w+)"')
_CALLED = re.compile(r"\b(condition|body|calls|to_apply)=%?([\w.\-]+)|"
                     r"\b(branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """Equal exchanges between devices.

  Attributes:
    kind: all-gather, all-reduce, all-to-all, collective-permute or reduce-scatter.
    count: how often a device takes part in a run of the program.
    sent: bytes that it sends each time, if rings carry it out.
    groups: devices that exchange with each other, by their places in the mesh. Of groups that are
      alike only the first; of permutes all pairs, which need not be alike.
  """

  kind: str
  count: int
  sent: float
  groups: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a run of the program moves, for each device.

  Attributes:
    bytes: read from and written to the device's memory.
    host_bytes: of copies between it and the host's memory.
    collectives: exchanges with others.
    calls: calls to kernels, by the target of the custom call.
    unknown_loops: loops whose turns are not known, counted once.
  """

  bytes: float
  host_bytes: float
  collectives: tuple[Collective, ...]
  calls: dict[str, int]
  unknown_loops: int

  def by_kind(self) -> dict[str, tuple[int, float]]:
    """Count and bytes sent of each kind of collective."""
    kinds = sorted({each.kind for each in self.collectives})
    of = lambda kind: [each for each in self.collectives if each.kind == kind]
    return {kind: (sum(each.count for each in of(kind)),
                   sum(each.count * each.sent for each in of(kind))) for kind in kinds}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line, as text: the result's shape, what stands in the brackets and what follows them."""

  name: str
  shape: str
  opcode: str
  inside: str
  rest: str

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the instructions whose results it takes."""
    return tuple(re.findall(r"%([\w.\-]+)", self.inside))

  @functools.cached_property
  def called(self) -> dict[str, list[str]]:
    """Names of computations, by the role that they play."""
    found: dict[str, list[str]] = {}
    for role, name, roles, names in _CALLED.findall(self.rest):
      found.setdefault(role or roles, []).extend(
        [name] if role else re.findall(r"[\w.\-]+", names))
    return found


@dataclasses.dataclass(frozen=True)
class _Computation:
  """Instructions by name, in their order; `root` is the result."""

  name: str
  instructions: dict[str, _Instruction]
  root: str


def read(text: str, devices: int) -> Traffic:
  """The traffic of a program, `compiled.as_text()`, on so many devices."""
  computations, entry = _parse(text)
  total, host, calls, unknown = 0.0, 0.0, dict[str, int](), 0
  exchanges: dict[tuple, int] = {}
  for computation, turns, fused, turns_known in _visits(computations, entry):
    unknown += not turns_known
    for each in computation.instructions.values():
      kind = each.opcode.removesuffix("-start")
      if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU: a fusion of that name, with a slice behind it
      crossing = each.opcode == "send" and _MEGASCALE.search(each.rest)
      if crossing or kind in _KINDS:
        key = _between_slices(each, crossing, devices) if crossing else (
          kind, *_exchange(kind, each, computation, devices))
        exchanges[key] = exchanges.get(key, 0) + turns
      if each.opcode == "custom-call" and (found := re.search(r'target="([^"]+)"', each.rest)):
        calls[found[1]] = calls.get(found[1], 0) + turns
      if not fused:
        total += turns * _moved(each, computation, computations)
      host += turns * _across(each, computation)
  collectives = tuple(Collective(kind, count, sent, groups) for (kind, sent, groups), count
                      in exchanges.items() if groups and len(groups[0]) > 1)
  return Traffic(total, host, collectives, calls, unknown)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations, entry = {}, ""
  name, lines, root = "", dict[str, _Instruction](), ""
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith((" ", "HloModule")):
      head = line.removeprefix("ENTRY ").lstrip("%")
      name, lines, root = re.split(r"[ (]", head, maxsplit=1)[0], {}, ""
      entry = name if line.startswith("ENTRY ") else entry
    elif line.startswith("}") and name:
      computations[name], name = _Computation(name, lines, root), ""
    elif name and " = " in line and (each := _instruction(line)) is not None:
      lines[each.name] = each
      root = each.name if line.lstrip().startswith("ROOT ") else root
  return computations, entry


def _instruction(line: str) -> _Instruction | None:
  left, right = line.strip().split(" = ", 1)
  end = _closing(right, 0) if right.startswith("(") else right.index(" ")
  shape, right = right[:end], right[end:].lstrip()
  found = re.match(r"([\w\-]+)\(", right)
  if found is None:
    return None
  end = _closing(right, found.end() - 1)
  return _Instruction(left.removeprefix("ROOT ").lstrip("%"), shape, found[1],
                      right[found.end():end - 1], right[end:])


def _closing(text: str, start: int) -> int:
  """The place after the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if not depth:
      return place + 1
  return len(text)


def _visits(
    computations: dict[str, _Computation], name: str, turns: int = 1, fused: bool = False
) -> Iterator[tuple[_Computation, int, bool, bool]]:
  """Computations that run: how often, whether inside of a fusion, and whether that is known."""
  known = True
  computation = computations[name]
  for each in computation.instructions.values():
    inner = turns
    if each.opcode == "while":
      found = _turns(each, computations)
      known, inner = known and found is not None, turns * (found or 1)
    if each.opcode in ("reduce", "sort", "scatter", "map", "reduce-window", "all-reduce",
                       "reduce-scatter", "select-and-scatter", "all-reduce-start"):
      continue  # what they apply to pairs of elements
    for names in each.called.values():
      for other in names:
        if other in computations:
          yield from _visits(computations, other, inner, fused or each.opcode == "fusion")
  yield computation, turns, fused, known


def _turns(loop: _Instruction, computations: dict[str, _Computation]) -> int | None:
  """How often a loop turns; None if that is not known."""
  if found := re.search(r'known_trip_count"?\s*:?\s*\{"?n"?\s*:\s*"?(\d+)', loop.rest):
    return int(found[1])
  condition = computations[loop.called["condition"][0]]
  test = condition.instructions[condition.root]
  if test.opcode != "compare" or "direction=LT" not in test.rest:
    return None
  limit = condition.instructions[test.operands[1]]
  return int(limit.inside) if limit.opcode == "constant" and limit.inside.isdigit() else None


# Bytes ------------------------------------------------------------------------------------


def size(shape: str, *, host: bool = False) -> float:
  """Bytes of a shape's text that lie in the device's main memory, or instead in the host's.

  Layouts say `S(1)` for memory on the chip and `S(5)` for the host's.
  """
  total = 0.0
  for kind, dimensions, layout in _SHAPE.findall(shape):
    space = re.search(r"S\((\d+)\)", layout or "")
    if (space[1] if space else "0") != ("5" if host else "0"):
      continue
    bits = _BITS.get(kind) or (int(found[1]) if (found := re.match(r"[a-z]+(\d+)", kind)) else 0)
    total += bits / 8 * math.prod(int(n) for n in dimensions.split(",") if n)
  return total


def _moved(each: _Instruction, computation: _Computation,
           computations: dict[str, _Computation]) -> float:
  """Bytes of the device's memory that an instruction reads and writes."""
  if each.opcode in _FREE or each.opcode.endswith(("-done", "-update")):
    return 0.0
  shapes = _shapes(each, computation)
  if each.opcode.removesuffix("-start") in _SLICES:  # one end may lie elsewhere
    part = _part(each, shapes)
    return size(part) + (size(_anywhere(part)) if size(shapes[0]) else 0.0)
  if each.opcode.endswith("-start"):  # the result repeats the operands
    return size(each.shape)
  if each.opcode == "gather":
    return 2 * size(each.shape)
  if each.opcode == "fusion":
    fused = computations[each.called["calls"][0]]
    reads = (_used(one.name, fused, computations) for one in _parameters(fused))
    return _written(fused, each) + sum(reads)
  return size(each.shape) + sum(map(size, shapes))


def _across(each: _Instruction, computation: _Computation) -> float:
  """Bytes that an instruction copies between the device's memory and the host's."""
  shapes = _shapes(each, computation)
  if each.opcode.removesuffix("-start") in _SLICES:
    part = _part(each, shapes)
    crosses = bool(size(shapes[0], host=True)) != bool(size(part, host=True))
    return size(_anywhere(part)) if crosses else 0.0
  if each.opcode in ("copy", "copy-start"):
    target = next(found[0] for found in _SHAPE.finditer(each.shape))  # then the source, if async
    if size(shapes[0], host=True) != size(target, host=True):
      return size(_anywhere(shapes[0]))
  return 0.0


def _part(each: _Instruction, shapes: list[str]) -> str:
  """The shape of what is cut out of an array or put into it."""
  if each.opcode.startswith("dynamic-update-slice"):
    return shapes[1]
  if each.opcode.endswith("-start"):  # the result repeats the operands, then comes the part
    return [found[0] for found in _SHAPE.finditer(each.shape)][len(shapes)]
  return each.shape


def _shapes(each: _Instruction, computation: _Computation) -> list[str]:
  """Shapes of its operands."""
  return [computation.instructions[name].shape for name in each.operands
          if name in computation.instructions]


def _anywhere(shape: str) -> str:
  """The shape without the memory that it lies in."""
  return re.sub(r"S\(\d+\)", "", shape)


def _parameters(fused: _Computation) -> list[_Instruction]:
  """The parameters of a computation, in their order."""
  found = [each for each in fused.instructions.values() if each.opcode == "parameter"]
  return sorted(found, key=lambda each: int(each.inside))


def _used(name: str, fused: _Computation, computations: dict[str, _Computation]) -> float:
  """Bytes that a fusion reads of one of its values: of one that is only sliced, the slices."""
  whole, used = size(fused.instructions[name].shape), 0.0
  for user in fused.instructions.values():
    for place, operand in enumerate(user.operands):
      if operand != name or (user.opcode == "dynamic-update-slice" and place == 0):
        continue  # what is updated is written in place
      if user.opcode in ("dynamic-slice", "slice", "gather"):
        used += size(user.shape)
      elif user.opcode == "bitcast":
        used += _used(user.name, fused, computations)
      elif user.opcode == "fusion":
        inner = computations[user.called["calls"][0]]
        used += _used(_parameters(inner)[place].name, inner, computations)
      else:
        return whole
  return min(used, whole)


def _written(fused: _Computation, fusion: _Instruction) -> float:
  """Bytes of a fusion's results: of one that is updated in place, the update."""
  root = fused.instructions[fused.root]
  results = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [
    root]
  total = size(fusion.shape)
  for each in results:
    if each.opcode == "dynamic-update-slice" and size(each.shape):
      update = fused.instructions[each.operands[1]]
      total -= size(each.shape) - size(_anywhere(update.shape))
  return max(total, 0.0)


# Groups -----------------------------------------------------------------------------------


def _exchange(kind: str, each: _Instruction, computation: _Computation, devices: int
              ) -> tuple[float, tuple[tuple[int, ...], ...]]:
  """Bytes that a device sends in a collective, and groups of devices."""
  whole = sum(size(_anywhere(shape)) for shape in _shapes(each, computation))
  if kind == "collective-permute":
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", each.rest)
    found = re.findall(r"\{(\d+),(\d+)\}", pairs[0]) if pairs else []
    # Some send to themselves: nothing, if all do.
    return whole, tuple((int(a), int(b)) for a, b in found if a != b)
  members = groups(each.rest, devices)
  return whole * _share(kind, len(members)), (members,)


def _between_slices(send: _Instruction, found: re.Match, devices: int
                    ) -> tuple[str, float, tuple[tuple[int, ...], ...]]:
  """Kind, bytes and group of a collective among devices at the same place of every slice.

  The slices are the mesh's first axis. The same rings are assumed as within a slice.
  """
  n = found["slices"].count(",") + 1
  whole = size(_anywhere(next(_SHAPE.finditer(send.shape))[0]))  # then its counter
  kind = found["kind"].lower().replace("_", "-")
  return kind, whole * _share(kind, n), (tuple(range(0, devices, devices // n)),)


def _share(kind: str, n: int) -> float:
  """Bytes that a device sends in a ring of n for each byte that it brings along."""
  return {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)


def groups(text: str, devices: int) -> tuple[int, ...]:
  """The first of an instruction's replica groups, in any of the ways that XLA writes them."""
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return tuple(map(int, found[1].split(",")))
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
    return tuple(_iota(found[2]).reshape(_numbers(found[1]))[0].tolist())
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\]"
                        r"(?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", text):
    axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
    wanted = re.findall(r"'([^']+)'", found[3])
    ids = _iota(found[2]) if found[2] else np.arange(math.prod(axes.values()))
    ids = ids.reshape(tuple(axes.values()))
    corner = tuple(slice(None) if name in wanted else 0 for name in axes)
    return tuple(ids[corner].reshape(-1).tolist())
  return tuple(range(devices))


def _iota(text: str) -> np.ndarray:
  """`[4,16]T(1,0)`: numbers from 0, 4 by 16, transposed."""
  shape, *order = (_numbers(part) for part in re.findall(r"[\d,]+", text))
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(order[0]) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(",")))
