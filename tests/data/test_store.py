"""Latent data sets: the bytes that come back, and what survives kills and full disks."""

import json
import pickle
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from videogpt_jax.data import store
from videogpt_jax.errors import InputError

_SPEC = store.Spec(
  channels=4, dtype="uint8", codec={"id": "pixels", "block": 2}, labels=("a", "b c")
)
_SIZES = ((2, 3), (4, 2), (2, 3))  # of the records of a shard


def _latents(seed, length, spec=_SPEC, size=(2, 3)):
  bits = np.random.default_rng(seed).integers(0, 256, (length, *size, spec.channels), np.uint8)
  return bits.astype(ml_dtypes.bfloat16) / 7 if spec.dtype == "bfloat16" else bits


def _write(path, shards=None, spec=_SPEC, lengths=(5, 1, 9), finish=True):
  """Three records a shard; record k of shard s has seed 10 * s + k."""
  writer = store.create(path, spec, shards or {"train": 2, "validation": 1}, {"made": "by hand"})
  for split, index in writer.pending():
    with writer.shard(split, index) as shard:
      for k, length in enumerate(lengths):
        shard.add(
          _latents(10 * index + k, length, spec, _SIZES[k]),
          fps=12.5,
          source=f"{split}/{index}/{k}",
          label=k,
          caption="a red ball, größer",
        )
  if finish:
    writer.finish()
  return writer


def _content(path):
  return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


def test_what_is_written_comes_back(tmp_path):
  _write(tmp_path / "set")
  source = store.open_split(tmp_path / "set", "train")
  assert source.info == _SPEC
  assert source.lengths.tolist() == [5, 1, 9, 5, 1, 9]
  assert len(source) == 6
  assert source.sizes.tolist() == [list(size) for size in 2 * _SIZES]
  assert source.buckets() == {(2, 3): 4, (4, 2): 2}
  assert source.num_bytes == sum(
    path.stat().st_size for path in (tmp_path / "set").glob("*train.array_record*"))
  for i in (5, 0, 4, 1, 3, 2):
    record = source[i]
    shard, k = divmod(i, 3)
    expected = _latents(10 * shard + k, (5, 1, 9)[k], size=_SIZES[k])
    np.testing.assert_array_equal(record["latents"], expected)
    assert record["source"] == f"train/{shard}/{k}"
    assert (record["fps"], record["stride"], record["label"]) == (12.5, 1, k)
    assert record["caption"] == "a red ball, größer"
    assert "masks" not in record
  with pytest.raises(IndexError):
    source[6]
  with pytest.raises(IndexError):
    source[-1]


def test_bfloat16_and_masks_come_back_bit_for_bit(tmp_path):
  spec = store.Spec(4, "bfloat16", {"id": "vae"}, moments=True, stride=3, masks=True)
  writer = store.create(tmp_path, spec, {"train": 1}, {})
  latents = _latents(0, 4, spec)
  masks = np.random.default_rng(1).integers(0, 2, (4, 5, 4, 6), np.uint8)
  with writer.shard("train", 0) as shard:
    shard.add(latents, fps=30.0, source="x", masks=masks)
  writer.finish()
  record = store.open_split(tmp_path, "train")[0]
  assert record["latents"].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(record["latents"].view(np.uint16), latents.view(np.uint16))
  np.testing.assert_array_equal(record["masks"], masks)
  assert (record["stride"], record["label"]) == (3, store.NO_LABEL)


def test_tensorflow_datasets_reads_the_folder(tmp_path):
  _write(tmp_path)
  builder = tfds.builder_from_directory(tmp_path)
  assert set(builder.info.splits) == {"train", "validation"}
  assert builder.info.splits["train"].num_examples == 6
  assert dict(builder.info.metadata)["spec"]["codec"] == _SPEC.codec
  source = builder.as_data_source("train")
  np.testing.assert_array_equal(source[5]["latents"], _latents(12, 9))
  assert source[5]["caption"].decode() == "a red ball, größer"
  assert [record["label"] for record in builder.as_data_source("train[1:3]")] == [1, 2]
  _write(tmp_path / "all" / store.NAME / "1.0.0")  # where tfds looks for a name
  named = tfds.data_source(store.NAME, split="train", data_dir=tmp_path / "all")
  np.testing.assert_array_equal(named[5]["latents"], _latents(12, 9))


def test_tensorflow_is_never_imported(tmp_path):
  _write(tmp_path)
  program = f"""
    import sys
    from videogpt_jax.data import pipeline, store
    source = store.open_split({str(tmp_path)!r}, "train")
    next(pipeline.batches(source, frames=5, interval=(1, 1), batch_size=2, seed=0))
    import tensorflow_datasets as tfds
    tfds.builder_from_directory({str(tmp_path)!r}).as_data_source("validation")[0]
    from videogpt_jax.data.store import Spec, create
    sys.exit("tensorflow" in sys.modules or "torch" in sys.modules)
  """
  subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_sources_travel_to_other_processes(tmp_path):
  _write(tmp_path)
  source = store.open_split(tmp_path, "train")
  source[0]  # opens the files, which must stay behind
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[4]["latents"], source[4]["latents"])
  assert copy.fingerprint == source.fingerprint


def test_fingerprint_follows_the_content(tmp_path):
  _write(tmp_path / "a")
  _write(tmp_path / "b")
  _write(tmp_path / "c", lengths=(5, 2, 9))
  fingerprint = {name: store.open_split(tmp_path / name, "train").fingerprint for name in "abc"}
  assert fingerprint["a"] == fingerprint["b"] != fingerprint["c"]
  assert store.open_split(tmp_path / "a", "validation").fingerprint != fingerprint["a"]


def test_same_records_give_the_same_bytes(tmp_path):
  _write(tmp_path / "a")
  _write(tmp_path / "b")
  assert _content(tmp_path / "a") == _content(tmp_path / "b")


def test_a_second_run_writes_only_what_is_missing(tmp_path):
  _write(tmp_path / "whole")
  path = tmp_path / "set"
  writer = store.create(path, _SPEC, {"train": 2, "validation": 1}, {"made": "by hand"})
  with writer.shard("train", 1) as shard:
    for k, length in enumerate((5, 1, 9)):
      shard.add(
        _latents(10 + k, length, size=_SIZES[k]), fps=12.5, source=f"train/1/{k}", label=k,
        caption="a red ball, größer",
      )
  with pytest.raises(RuntimeError, match="in the middle"), writer.shard("train", 0) as shard:
    shard.add(_latents(0, 5), fps=1.0, source="never seen")
    raise RuntimeError("in the middle")
  assert not list(path.glob("*train*00000*"))
  with pytest.raises(InputError, match="unfinished"):
    store.open_split(path, "train")
  with pytest.raises(InputError, match="lacks 2 shards"):
    writer.finish()
  before = (path / "videogpt-train.array_record-00001-of-00002").stat().st_mtime_ns
  again = _write(path)
  assert again.pending() == []
  assert (path / "videogpt-train.array_record-00001-of-00002").stat().st_mtime_ns == before
  assert _content(path) == _content(tmp_path / "whole")


def test_writers_that_begin_at_once_do_not_disturb_each_other(tmp_path):
  """As in containers, where every writer is process 1 of its machine."""
  program = f"""
    import os, pathlib, socket, sys, time
    from videogpt_jax.data import store
    name, os.getpid = sys.argv[1], lambda: 1
    socket.gethostname = lambda: name
    base = pathlib.Path({str(tmp_path)!r})
    spec = store.Spec(4, "uint8", {{}})
    (base / name).touch()
    while len(list(base.glob("writer*"))) < 3:
      time.sleep(0.001)
    start = max(path.stat().st_mtime for path in base.glob("writer*")) + 0.5
    for i in range(40):
      while time.time() < start + 0.02 * i:
        pass
      store.create(base / f"set{{i}}", spec, {{"train": 1}}, {{}})
  """
  running = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), f"writer{i}"],
                              stderr=subprocess.PIPE, text=True) for i in range(3)]
  errors = [process.communicate()[1] for process in running]
  assert [process.returncode for process in running] == [0, 0, 0], errors
  assert all((tmp_path / f"set{i}" / "metadata.json").exists() for i in range(40))


def test_a_killed_finish_is_repeated(tmp_path):
  writer = _write(tmp_path / "set", finish=False)
  _write(tmp_path / "whole")
  # What a kill leaves just before the last rename: all files but the one that seals the set.
  for name in ("rejected.jsonl", "features.json", "shapes-train.npy"):
    (tmp_path / "set" / name).write_bytes(b"half")
  writer.finish()
  assert _content(tmp_path / "set") == _content(tmp_path / "whole")
  assert not (tmp_path / "set" / ".partial").exists()
  writer.finish()  # by another host that had the same idea


def test_rejected_videos_are_listed_in_order(tmp_path):
  writer = store.create(tmp_path, _SPEC, {"train": 2}, {})
  for index in (1, 0):  # whichever process comes first
    with writer.shard("train", index) as shard:
      shard.reject(f"{index}.mp4", "too short: 3 frames")
      shard.add(_latents(0, 2), fps=1.0, source="x")
  assert writer.num_records("train") == 2
  writer.finish()
  lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
  assert [json.loads(line)["source"] for line in lines] == ["0.mp4", "1.mp4"]
  assert writer.rejected()[0]["reason"] == "too short: 3 frames"


def test_an_empty_shard_does_no_harm(tmp_path):
  writer = store.create(tmp_path, _SPEC, {"train": 2}, {})
  with writer.shard("train", 0) as shard:
    shard.reject("a", "why")
  with writer.shard("train", 1) as shard:
    shard.add(_latents(3, 2), fps=1.0, source="x")
  writer.finish()
  source = store.open_split(tmp_path, "train")
  assert source.lengths.tolist() == [2]
  np.testing.assert_array_equal(source[0]["latents"], _latents(3, 2))


@pytest.mark.parametrize(
  "latents",
  [np.zeros((2, 2, 3, 5), np.uint8), np.zeros((2, 2, 3, 4), np.float32)],
  ids=["shape", "type"],
)
def test_latents_unlike_the_spec_are_refused(tmp_path, latents):
  writer = store.create(tmp_path, _SPEC, {"train": 1}, {})
  with pytest.raises(ValueError, match=r"Shape|Dtype"), writer.shard("train", 0) as shard:
    shard.add(latents, fps=1.0, source="x")
  assert writer.pending() == [("train", 0)]


def test_other_settings_do_not_continue_a_data_set(tmp_path):
  _write(tmp_path)
  store.create(tmp_path, _SPEC, {"train": 2, "validation": 1}, {"made": "by hand"})
  with pytest.raises(InputError, match=r"origin.made: by hand, now by me"):
    store.create(tmp_path, _SPEC, {"train": 2, "validation": 1}, {"made": "by me"})
  with pytest.raises(InputError, match=r"shards.train: 2, now 3"):
    store.create(tmp_path, _SPEC, {"train": 3, "validation": 1}, {"made": "by hand"})


def test_a_folder_of_other_things_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(InputError, match="holds other files"):
    store.create(tmp_path, _SPEC, {"train": 1}, {})


def test_unwritable_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"cannot write the data set to .*Not a directory"):
    store.create(tmp_path / "file" / "set", _SPEC, {"train": 1}, {})


def test_opening_what_is_not_there(tmp_path):
  with pytest.raises(InputError, match=r"no latent data set at .*videogpt_jax.encode"):
    store.open_split(tmp_path / "nowhere", "train")
  _write(tmp_path)
  with pytest.raises(InputError, match="no split 'test', only train, validation"):
    store.open_split(tmp_path, "test")
  (tmp_path / "videogpt-train.array_record-00001-of-00002").unlink()
  with pytest.raises(InputError, match=r"00001-of-00002 is missing"):
    store.open_split(tmp_path, "train")


def test_a_damaged_shard_names_the_record(tmp_path):
  _write(tmp_path)
  source = store.open_split(tmp_path, "train")
  shard = tmp_path / "videogpt-train.array_record-00000-of-00002"
  content = bytearray(shard.read_bytes())
  content[100:65000] = bytes(64900)
  shard.write_bytes(content)
  with pytest.raises(InputError, match=r"record 1 of .* cannot be read"):
    source[1]


def test_full_disk_is_reported_and_leaves_finished_shards(tmp_path):
  """A limit on the size of files fails writes in the same place as a full disk does."""
  program = f"""
    import resource, signal, sys
    import numpy as np
    from videogpt_jax.data import store
    from videogpt_jax.errors import InputError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    spec = store.Spec(48, "uint8", {{}})
    writer = store.create({str(tmp_path)!r}, spec, {{"train": 2}}, {{}})
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 48), np.uint8)
    with writer.shard("train", 0) as shard:
      shard.add(noise, fps=1.0, source="x")
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    try:
      with writer.shard("train", 1) as shard:
        for _ in range(20):
          shard.add(noise, fps=1.0, source="x")
    except InputError as error:
      print(error)
      sys.exit(3)
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 3, done.stderr
  assert "File too large" in done.stdout and "run the same command again" in done.stdout
  spec = store.Spec(48, "uint8", {})
  writer = store.create(tmp_path, spec, {"train": 2}, {})
  assert writer.pending() == [("train", 1)]
  assert not list((tmp_path / ".partial").glob("*.tmp-*"))
