"""Reading compiled programs, topologies by name, and estimates; on simulated devices alone."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import tiny_run
from videogpt_jax import flops
from videogpt_jax.aot import chips
from videogpt_jax.aot import estimate
from videogpt_jax.aot import facts as facts_lib
from videogpt_jax.aot import hlo
from videogpt_jax.aot import process
from videogpt_jax.aot import topology
from videogpt_jax.errors import InputError


@pytest.fixture(scope="module")
def compiler():
  """A process with four simulated devices."""
  one = process.Compiler(topology.parse("cpu:4"))
  yield one
  one.close()


# Programs ---------------------------------------------------------------------------------


def _sums_in_loops():
  """Runs in the process: 3 times 7 sums of 128 numbers over two of four devices, and one more."""
  mesh = Mesh(np.reshape(jax.devices(), (2, 2)), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

  def function(x):
    inner = lambda x, _: (jax.lax.psum(x, "a") * 0.5, None)
    outer = lambda x, _: (jax.lax.scan(inner, x, length=7)[0] + 1, None)
    return jax.lax.psum(jax.lax.scan(outer, x, length=3)[0], ("a", "b"))

  spec = PartitionSpec(("a", "b"))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(),
                         check_vma=False)
  return jax.jit(mapped).lower(jnp.zeros(4 * 128)).compile().as_text()


def test_what_stands_in_loops_counts_as_often_as_they_turn(compiler):
  text = compiler(_sums_in_loops)
  found = {each.groups[0]: each for each in hlo.read(text, 4).collectives}
  assert found.keys() == {(0, 2), (0, 1, 2, 3)}
  inner, last = found[0, 2], found[0, 1, 2, 3]
  assert (inner.kind, inner.count, last.count) == ("all-reduce", 21, 1)
  assert inner.sent == 512  # half of it, twice: to sum and to tell
  assert last.sent == 2 * 512 * 3 / 4


def test_turns_that_the_compiler_does_not_state():
  """Those of a loop whose counter is compared with a constant are found all the same."""
  text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%test (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%a), condition=%test, body=%body
}
"""
  found = hlo.read(text, 2)
  assert (found.by_kind(), found.unknown_loops) == ({"all-reduce": (5, 5 * 32.0)}, 0)
  data_says = text.replace("%lt = pred[] compare(%j, %n), direction=LT", "%lt = pred[] custom()")
  found = hlo.read(data_says, 2)
  assert (found.by_kind(), found.unknown_loops) == ({"all-reduce": (1, 32.0)}, 1)


def test_permutes_have_all_their_pairs():
  text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} collective-permute(%a), source_target_pairs={{0,0},{1,2},{2,1}}
  ROOT %c = f32[8]{0} collective-permute(%b), source_target_pairs={{0,0},{1,1}}
}
"""
  found, = hlo.read(text, 3).collectives
  assert (found.kind, found.count, found.sent, found.groups) == (
    "collective-permute", 1, 32.0, ((1, 2), (2, 1)))


def test_what_crosses_slices():
  """As libtpu writes it, for four slices of two chips: a shard of 6 numbers, summed over slices."""
  attributes = ('is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",'
                '_xla_megascale_target="{1,2,3,4}x{0:1}",'
                '_xla_megascale_transfer_type="ALL_REDUCE"}')
  text = f"""
ENTRY %main (a: f32[6]) -> f32[6] {{
  %a = f32[6]{{0}} parameter(0)
  %t = token[] after-all()
  %s = (f32[6]{{0}}, u32[], token[]) send(%a, %t), channel_id=2, {attributes}
  %r = (f32[6]{{0}}, u32[], token[]) recv(%t), channel_id=1, {attributes}
  %d = token[] send-done(%s), channel_id=2
  %e = (f32[6]{{0}}, token[]) recv-done(%r), channel_id=1
  ROOT %x = f32[6]{{0}} get-tuple-element(%e), index=0
}}
"""
  found, = hlo.read(text, 8).collectives
  assert (found.kind, found.count, found.groups) == ("all-reduce", 1, ((0, 2, 4, 6),))
  assert found.sent == 2 * 24 * 3 / 4


def test_loops_of_unknown_length_are_reported():
  """A loop that ends when the data says so."""
  function = lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 2, x)
  text = jax.jit(function).lower(jnp.ones(8)).compile().as_text()
  assert hlo.read(text, 1).unknown_loops == 1


def test_bytes_of_a_sum():
  """Two inputs are read and one is written."""
  x = jnp.zeros(1 << 20)
  text = jax.jit(lambda a, b: a + b).lower(x, x).compile().as_text()
  assert hlo.read(text, 1).bytes == 3 * 4 * 2**20


def test_a_loop_over_slices_moves_the_slices():
  """Every turn reads one row of the input and writes one of the output, not the whole of them."""
  x = jnp.zeros((50, 1 << 14))
  scan = lambda x: jax.lax.scan(lambda c, row: (c, jnp.sin(row)), 0, x)[1]
  moved = hlo.read(jax.jit(scan).lower(x).compile().as_text(), 1).bytes
  assert 2 * x.nbytes <= moved < 5 * x.nbytes  # 100 times as much, were they counted whole


@pytest.mark.parametrize(("text", "members"), [
  ("replica_groups={{0,4},{1,5}}", (0, 4)),
  ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
  ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
  ("replica_groups=mesh['x'=2,'y'=4] {'y'}, use", (0, 1, 2, 3)),
  ("replica_groups=mesh['x'=2,'y'=4] {'x'}, use", (0, 4)),
  ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, use", (0, 2, 4, 6)),
  ("replica_groups={}", tuple(range(8))),
])
def test_groups(text, members):
  assert hlo.groups(text, 8) == members


@pytest.mark.parametrize(("shape", "size", "host"), [
  ("f32[3,4]{1,0}", 48, 0),
  ("(bf16[8]{0}, s32[], pred[5]{0})", 25, 0),
  ("bf16[16,128]{1,0:T(8,128)(2,1)S(1)}", 0, 0),  # on the chip
  ("bf16[16]{0:T(128)S(5)}", 0, 32),
  ("s4[10]{0}", 5, 0),
])
def test_sizes_of_shapes(shape, size, host):
  assert hlo.size(shape) == size
  assert hlo.size(shape, host=True) == host


def test_slices_that_come_from_the_host_and_go_back():
  """As compilers for TPU write them, asynchronously; 12 numbers of 4 bytes each way, twice."""
  there, here = "f32[9,12]{1,0:T(8)S(5)}", "f32[1,12]{1,0:T(8)}"
  update = f"(({there}, {here}, s32[], s32[]), {there}, u32[]{{:S(2)}})"
  text = f"""
%body (p: (s32[], {there})) -> (s32[], {there}) {{
  %p = (s32[], {there}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = {there} get-tuple-element(%p), index=1
  %s = (({there}, s32[], s32[]), {here}, u32[]{{:S(2)}}) dynamic-slice-start(%x, %i, %i)
  %d = {here} dynamic-slice-done(%s)
  %u = {update} dynamic-update-slice-start(%x, %d, %i, %i)
  %v = {there} dynamic-update-slice-done(%u)
  ROOT %t = (s32[], {there}) tuple(%i, %v)
}}

%test (q: (s32[], {there})) -> pred[] {{
  %q = (s32[], {there}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(2)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}}

ENTRY %main (a: (s32[], {there})) -> (s32[], {there}) {{
  %a = (s32[], {there}) parameter(0)
  ROOT %w = (s32[], {there}) while(%a), condition=%test, body=%body
}}
"""
  found = hlo.read(text, 1)
  assert found.host_bytes == 2 * 2 * 12 * 4
  assert found.unknown_loops == 0


# Topologies -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [
  ("v5p:4x4x4", 64), ("v5p:4x4x4@2", 128), ("v5e:2x4", 8), ("h100:8x8", 64),
  ("h200:1", 1), ("cpu:8", 8)])
def test_names_of_topologies(name, count):
  found = topology.parse(name)
  assert (found.name, found.count) == (name, count)


@pytest.mark.parametrize("name", ["", "v5p", "a100:8", "v5p:4x4", "h100:8x8x8", "cpu:0", "v5e:4x",
                                  "v5e:4x4@0", "h100:8x8@2"])
def test_names_that_are_none(name):
  with pytest.raises(InputError, match=r"known are v5p:4x4x4 .*h100:8x8 .*cpu:8"):
    topology.parse(name)


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"libtpu missing.*pip install -e '\.\[aot\]'"):
    topology.require(chips.CHIPS["v5p"])
  topology.require(chips.CHIPS["cpu"])


# The command ------------------------------------------------------------------------------


def test_a_report_for_devices_that_are_not_there(tiny, tmp_path):
  """Of a step in two microbatches on a mesh of two axes; jax sees but one device here."""
  tiny.model.attention = "xla"
  tiny.train.accumulation = 2
  tiny.mesh.data, tiny.mesh.fsdp = 2, 2
  file = tiny_run.config_file(tiny, tmp_path / "config.py")
  result = tiny_run.run("main", f"--config={file}", "--dry_run", "--topology=cpu:4")
  assert result.returncode == 0, result.stderr
  said = result.stdout
  assert "devices: 4 x cpu, mesh {'slice': 1, 'data': 2, 'fsdp': 2" in said
  assert "each computes 1 video(s) at once, 2 time(s) a step" in said
  assert re.search(r"in all +[\d.]+ [KM]iB 4 devices", said)
  assert "  it fits\n" in said
  assert re.search(r"all-(gather|reduce) +[\d.]+ [KM]iB sent in \d+", said)


@pytest.mark.parametrize(("arguments", "message"), [
  (["--topology=cpu:4"], "--topology says what --dry_run is to compile for"),
  (["--topology=h9000:4", "--dry_run"], "'h9000:4' names no known topology; known are"),
  (["--topology=cpu:3", "--dry_run"], "does not divide among 3 devices"),
])
def test_a_report_that_cannot_be_made(tiny, tmp_path, arguments, message):
  file = tiny_run.config_file(tiny, tmp_path / "config.py")
  result = tiny_run.run("main", f"--config={file}", *arguments)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.startswith("error: ")


# Estimates --------------------------------------------------------------------------------


def _facts(collectives=(), **changes):
  """On 16 H100s in two nodes: 1e15 needed FLOPs in products, 6e14 in attention."""
  facts = facts_lib.Facts(
    device="NVIDIA H100 80GB HBM3", places=tuple((i // 8, i) for i in range(16)),
    mesh={"data": 16}, rows=1, accumulation=1, latents=(4, 8, 8, 4), attention="gpu",
    remat="none", parameters={}, cost=flops.Cost(100.0, 100.0, 1e15, 3e14, 6e14),
    memory=facts_lib.Memory(), compile_seconds=1.0,
    traffic=hlo.Traffic(3.352e12, 0.0, tuple(collectives), {}, 0))
  return dataclasses.replace(facts, **changes)


def test_the_estimate_by_hand():
  found = estimate.of(_facts(), chips.CHIPS["h100"])
  # Attention: 2 products forward, 7 backward, of which 2 + 4 are needed.
  compute = (1e15 / estimate.PRODUCTS + 9 / 6 * 6e14 / estimate.ATTENTION) / 16 / 989e12
  assert found.compute == pytest.approx(compute)
  assert found.memory == pytest.approx(1 / estimate.MEMORY)
  assert found.exchange == 0
  assert found.longest == pytest.approx(compute + 1 / estimate.MEMORY)
  assert found.mfu[1] == pytest.approx(1.6e15 / 16 / 989e12 / found.shortest)


def test_recomputation_takes_time_and_is_no_use():
  none, full = (estimate.of(_facts(remat=name), chips.CHIPS["h100"]) for name in ("none", "full"))
  assert full.flops - none.flops == pytest.approx((3e14 + 2e14) / 16)
  assert full.mfu[0] < none.mfu[0]


@pytest.mark.parametrize(("groups", "rate"), [
  (((0, 1, 2, 3),), 450e9),  # in one node
  (((0, 8),), 50e9),  # one of each: a network card
  ((tuple(range(16)),), 400e9),  # all of both: eight cards
  (((0, 1), (7, 8)), 50e9),  # a permute waits for its slowest pair
])
def test_the_way_that_an_exchange_takes(groups, rate):
  exchange = hlo.Collective("all-gather", 3, 1e9, groups)
  found = estimate.of(_facts([exchange]), chips.CHIPS["h100"]).exchange
  assert found == pytest.approx(3 * 1e9 / rate / estimate.LINKS)


@pytest.mark.parametrize(("shape", "rates"), [
  ((4, 4, 4), (200e9, 400e9, 600e9)),
  ((2, 4, 4), (200e9, 400e9, 500e9)),  # an axis of two chips is no ring: one link instead of two
])
def test_a_torus_has_links_along_each_axis(shape, rates):
  places = tuple((0, *np.unravel_index(i, shape)) for i in range(int(np.prod(shape))))
  exchanges = [hlo.Collective("all-reduce", 1, 1e9, (members,))
               for members in ((0, 1, 2, 3), tuple(range(16)), tuple(range(len(places))))]
  seconds = [estimate.of(_facts([one], places=places, device="TPU v5"),
                         chips.CHIPS["v5p"]).exchange for one in exchanges]
  np.testing.assert_allclose(seconds, [1e9 / estimate.LINKS / rate for rate in rates])


def test_between_slices_there_is_only_the_network():
  places = tuple((i // 4, i % 2, i // 2 % 2, 0) for i in range(8))
  exchange = hlo.Collective("all-reduce", 1, 1e9, ((0, 4),))
  found = estimate.of(_facts([exchange], places=places, device="TPU v5"), chips.CHIPS["v5p"])
  assert found.exchange == pytest.approx(1e9 / 6.25e9 / estimate.LINKS)


def test_no_estimate_without_a_data_sheet():
  assert estimate.of(_facts(device="cpu"), chips.CHIPS["cpu"]) is None
