"""From 8 to 1,024 chips, estimated: `python -m videogpt_jax.benchmarks.scaling`.

    python -m videogpt_jax.benchmarks.scaling --config=configs/stage4.py --chips=v5p --sizes=8,64

The whole train step is compiled for every topology (extra `[aot]`, in an environment of its
own), so memory and exchanges are the compilers' figures; the times are estimates, see
`videogpt_jax.aot.estimate`. No device is needed, and none has confirmed them.

The global batch stays. Videos are split over as many chips as they divide among, up to 64, with
`fsdp` 8; further chips split the sequence. Sizes that are in the result file already are kept,
so that the table can be made bit by bit.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections import ConfigDict

from videogpt_jax import cli
from videogpt_jax import config as config_lib
from videogpt_jax import dry_run
from videogpt_jax.aot import estimate
from videogpt_jax.aot import facts as facts_lib
from videogpt_jax.aot import topology as topology_lib
from videogpt_jax.benchmarks import report
from videogpt_jax.errors import InputError

# Slices of v5p by chips; nodes of H100 have eight.
_V5P = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16"}
_BATCH_SHARDS = 64
_FSDP = 8
_COLUMNS = ("config", "topology", "data x fsdp x sequence", "microbatches", "remat", "memory, GiB",
            "step, s", "MFU", "sent by a chip, GB", "compiled in, s")


def topology(chips: str, count: int) -> topology_lib.Topology:
  """So many chips of a kind. Raises `InputError` for a number that no slice has."""
  if chips == "v5p":
    if count not in _V5P:
      raise InputError(f"v5p has slices of {', '.join(map(str, _V5P))} chips here, not of {count}")
    return topology_lib.parse(f"v5p:{_V5P[count]}")
  if chips not in ("h100", "h200"):
    raise InputError(f"the table is for v5p, h100 and h200, not for {chips!r}")
  if count % 8:
    raise InputError(f"nodes of {chips} have 8 GPUs; {count} are no whole nodes")
  return topology_lib.parse(f"{chips}:{count // 8}x8")


def for_chips(config: ConfigDict, count: int) -> ConfigDict:
  """The configuration with a mesh and microbatches for so many chips."""
  config = ConfigDict(config)
  shards = math.gcd(config.train.batch_size, min(count, _BATCH_SHARDS))
  fsdp = math.gcd(shards, _FSDP)
  for axis, size in (("data", shards // fsdp), ("fsdp", fsdp), ("sequence", count // shards),
                     ("tensor", 1)):
    config.mesh[axis] = size
  config.train.accumulation = max(1, config.train.batch_size // shards)
  return config


def row(config: ConfigDict, where: topology_lib.Topology) -> dict[str, Any]:
  """What is known of one size, JSON-able."""
  facts = facts_lib.of_topology(for_chips(config, where.count), where)
  found, traffic = estimate.of(facts, where.chip), facts.traffic
  return {
    "config": config.name, "topology": where.name, "chips": where.count, "mesh": facts.mesh,
    "accumulation": facts.accumulation, "attention": facts.attention,
    "remat": facts.remat,
    "memory": {**dataclasses.asdict(facts.memory), "total": facts.memory.total,
               "fits": dry_run.fits(facts, where.chip)[0]},
    "flops_needed": facts.cost.total, "needed_tokens": facts.cost.tokens,
    "bytes_moved": traffic.bytes if traffic else None,
    "collectives": traffic.by_kind() if traffic else None,
    "estimate": found and {**dataclasses.asdict(found), "shortest": found.shortest,
                           "longest": found.longest},
    "compile_seconds": facts.compile_seconds, **report.stamp()}


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows as a table in Markdown."""
  lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
  for each in rows:
    mesh, memory, found = each["mesh"], each["memory"], each["estimate"]
    sent = sum(sent for _, sent in (each["collectives"] or {}).values())
    cells = [
      each["config"], each["topology"],
      " x ".join(str(mesh[axis]) for axis in ("data", "fsdp", "sequence")),
      each["accumulation"], each["remat"],
      f"{memory['total'] / 2**30:.1f}" + ("" if memory["fits"] else ", does not fit"),
      f"{found['shortest']:.2f} to {found['longest']:.2f}" if found else "",
      f"{found['mfu'][0]:.0%} to {found['mfu'][1]:.0%}" if found else "",
      f"{sent / 1e9:.1f}", f"{each['compile_seconds']:.0f}"]
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines)


def main() -> None:
  """Reads the flags and makes the table."""
  f = flags.FLAGS
  config_lib.validate(f.config)
  path = pathlib.Path(f.out)
  known = json.loads(path.read_text())["rows"] if path.exists() else []
  rows = {(each["config"], each["topology"]): each for each in known}
  for chips in f.chips:
    for count in map(int, f.sizes):
      where = topology(chips, count)
      if (f.config.name, where.name) not in rows:
        rows[f.config.name, where.name] = row(f.config, where)
        print(table([rows[f.config.name, where.name]]), flush=True)
        _write(list(rows.values()), f.out)
  print(table(list(rows.values())))


def _write(rows: list[dict[str, Any]], out: str) -> None:
  rows = sorted(rows, key=lambda each: (each["config"], each["topology"].split(":")[0],
                                        each["chips"]))
  shares = {name.lower(): getattr(estimate, name)
            for name in ("PRODUCTS", "ATTENTION", "MEMORY", "LINKS")}
  report.finish({"benchmark": "scaling", "what": "ESTIMATE by compilation, nothing was run",
                 "attained_shares": shares, "rows": rows}, out, "")
  text = ("ESTIMATES from programs compiled for chips that were not there; nothing was run. What "
          "they assume: docs/scaling.md.\n\n")
  pathlib.Path(out).with_suffix(".md").write_text(text + table(rows) + "\n")


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", "configs/stage4.py", "What is trained.")
  flags.DEFINE_list("chips", ["v5p", "h100"], "Kinds of chips.")
  flags.DEFINE_list("sizes", ["8", "16", "32", "64", "128", "256", "512", "1024"], "Chips.")
  flags.DEFINE_string("out", str(report.RESULTS / "scaling_estimate.json"),
                      "JSON file; a table in Markdown is written beside it.")
  cli.run(main)
