"""Encoding a folder of good, odd and bad videos: what is kept and why, and kills at any moment.

In `make test` three kills; in `make soak` twenty in 200 videos, and the result goes to
benchmarks/results/encode_soak.json.
"""

import collections
import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

import tiny_run
from videogpt_jax import config as config_lib
from videogpt_jax import encode
from videogpt_jax.benchmarks import report
from videogpt_jax.data import store
from videogpt_jax.data import video
import zoo

ROOT = pathlib.Path(__file__).parents[1]
VAE = ROOT / "tests" / "golden" / "vae"


def _config(videos, out, per_shard=8):
  c = config_lib.default()
  c.data.videos, c.data.path = str(videos), str(out)
  c.data.buckets = "32x32,32x48,48x32"
  c.data.min_side, c.data.frames = 30, 4
  c.data.videos_per_shard = per_shard
  c.codec.id, c.codec.block, c.codec.scale, c.codec.shift = "vae", 8, 0.13025, 0.0
  c.codec.path, c.codec.moments = str(VAE), True
  return c


def _content(path):
  return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


def _rejected(path):
  lines = (path / store.REJECTED).read_text().splitlines()
  return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
  """Videos, the frames of the usable ones, and the data set made of them undisturbed."""
  folder = tmp_path_factory.mktemp("few")
  usable = zoo.make(folder / "videos", 34)
  out = encode.encode(_config(folder / "videos", folder / "whole"), processes=2)
  return folder, usable, out


def test_usable_videos_are_kept_and_others_listed_with_the_reason(few):
  _, usable, out = few
  reasons = _rejected(out)
  assert set(reasons) == set(zoo.BAD)
  for name, begin in zoo.BAD.items():
    assert reasons[name].startswith(begin), (name, reasons[name])
  found = {}
  for split in store.splits(out):
    source = store.open_split(out, split)
    for i in range(len(source)):
      record = source[i]
      assert np.isfinite(record["latents"].astype(np.float32)).all()
      found[record["source"]] = len(record["latents"])
  assert found == usable


def test_every_video_has_the_size_most_like_it(few):
  folder, _, out = few
  source = store.open_split(out, "train")
  wanted = {(48, 64): (4, 6), (64, 48): (6, 4), (64, 64): (4, 4), (72, 128): (4, 6)}
  seen = collections.Counter()
  for i in range(len(source)):
    name = source[i]["source"]
    size = video.read(folder / "videos" / name).frames.shape[1:3]
    if size in wanted:
      assert tuple(source.sizes[i]) == wanted[size], name
      seen[size] += 1
  assert set(seen) == set(wanted)


def test_two_processes_give_the_same_data_set_as_one(few, tmp_path):
  """Started together, as jobs of an array are."""
  folder, _, whole = few
  file = tiny_run.config_file(_config(folder / "videos", tmp_path / "set"), tmp_path / "c.py")
  jobs = [subprocess.Popen(_command(file, f"--shard={i}/2"), stdout=subprocess.PIPE, text=True)
          for i in range(2)]
  said = [job.communicate()[0] for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0]
  assert any("encode done:" in text for text in said)
  assert _content(tmp_path / "set") == _content(whole)


def test_processes_of_a_cluster_share_the_work(tmp_path):
  """Two tasks as SLURM would start them, on this machine."""
  c = tiny_run.config(tmp_path / "set")
  c.data.videos_per_shard = 4
  file = tiny_run.config_file(c, tmp_path / "c.py")
  job = str(random.SystemRandom().randrange(4096))  # decides the port
  tasks = [subprocess.Popen(
    _command(file, "--distributed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost",
         "SLURM_NTASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
         "SLURM_STEP_NUM_NODES": "1"}) for i in range(2)]
  said = [task.communicate(timeout=120) for task in tasks]
  assert [task.returncode for task in tasks] == [0, 0], said
  assert all("encode 16 videos (world)" in out for out, _ in said)
  nowhere = subprocess.run(_command(file, "--distributed"), capture_output=True, text=True,
                           check=False)
  assert nowhere.returncode == 2 and "--shard=I/N" in nowhere.stderr
  c.data.path = str(tmp_path / "alone")
  assert _content(encode.encode(c)) == _content(tmp_path / "set")


def test_a_list_with_missing_and_hanging_files(few, tmp_path):
  """A pipe that nobody writes to is a file whose decoder never comes back."""
  folder, _, _ = few
  os.mkfifo(tmp_path / "pipe.mp4")
  names = ["001.mp4", "gone.mp4", "002.mp4"]
  lines = [f"{folder / 'videos' / name}" for name in names] + [str(tmp_path / "pipe.mp4")]
  (tmp_path / "list.txt").write_text("\n".join(lines))
  c = _config(tmp_path / "list.txt", tmp_path / "set")
  c.codec.id, c.data.validation_fraction, c.data.decode_timeout = "pixels", 0.0, 1.0
  out = encode.encode(c, processes=2)
  assert len(store.open_split(out, "train")) == 2
  reasons = {name.rpartition("/")[2]: reason for name, reason in _rejected(out).items()}
  assert reasons == {"gone.mp4": "missing: no such file",
                     "pipe.mp4": "decoder hung: no frame for 1 s, 2 times"}


def test_parts_labels_and_captions_of_a_manifest(few, tmp_path):
  folder, _, _ = few
  (tmp_path / "list.csv").write_text(
    "path,start,end,label,caption,split\n"
    "001.mp4,0.2,0.8,jump,a leap,train\n"
    "001.mp4,0.8,,run,,train\n"
    "002.mp4,,,run,\"long, and quoted\",validation\n", encoding="utf-8")
  c = _config(tmp_path / "list.csv", tmp_path / "set")
  c.codec.id, c.data.root = "pixels", str(folder / "videos")
  out = encode.encode(c, processes=1)
  train, held_out = (store.open_split(out, split) for split in ("train", "validation"))
  assert train.info.labels == ("jump", "run")
  records = [train[0], train[1], held_out[0]]
  assert [r["label"] for r in records] == [0, 1, 1]
  assert [r["caption"] for r in records] == ["a leap", "", "long, and quoted"]
  assert [len(r["latents"]) for r in records] == [6, 5, 14]
  assert [r["source"] for r in records] == ["001.mp4@0.2-0.8", "001.mp4@0.8-", "002.mp4"]


def test_scenes_become_records_of_their_own(tmp_path):
  (tmp_path / "videos").mkdir()
  parts = [zoo.frames(seed, (64, 64), count) for seed, count in ((0, 9), (1, 3), (2, 7))]
  parts[1], parts[2] = 255 - parts[1], parts[2][..., ::-1] // 2
  zoo.write(tmp_path / "videos" / "a.mp4", np.concatenate(parts))
  c = _config(tmp_path / "videos", tmp_path / "set")
  c.codec.id, c.data.validation_fraction, c.data.scene_cut = "pixels", 0.0, 20.0
  out = encode.encode(c, processes=1)
  source = store.open_split(out, "train")
  assert source.lengths.tolist() == [9, 7]  # the scene of three frames is too short
  assert [source[i]["source"] for i in range(2)] == ["a.mp4#0", "a.mp4#1"]
  c.data.scene_cut, c.data.path = 0.0, str(tmp_path / "whole")
  assert store.open_split(encode.encode(c), "train").lengths.tolist() == [19]


def test_a_rate_of_our_choice(few, tmp_path):
  folder, _, _ = few
  c = _config(folder / "videos", tmp_path / "set")
  c.codec.id, c.data.fps = "pixels", 5.0
  out = encode.encode(c, processes=2)
  source = store.open_split(out, "train")
  lengths = {source[i]["source"]: (len(source[i]["latents"]), source[i]["fps"])
             for i in range(len(source))}
  assert lengths["001.mp4"] == (7, 5.0)  # 13 frames, ten a second


def test_an_autoencoder_that_lacks_a_tensor(few, tmp_path):
  folder, _, _ = few
  from safetensors import numpy as safetensors

  (tmp_path / "vae").mkdir()
  (tmp_path / "vae" / "config.json").write_bytes((VAE / "config.json").read_bytes())
  name = "diffusion_pytorch_model.safetensors"
  tensors = safetensors.load_file(VAE / name)
  del tensors["quant_conv.weight"]
  safetensors.save_file(tensors, tmp_path / "vae" / name)
  c = _config(folder / "videos", tmp_path / "set")
  file = tiny_run.config_file(c, tmp_path / "c.py")
  result = tiny_run.run("encode", f"--config={file}", f"--vae={tmp_path / 'vae'}")
  assert result.returncode == 2
  assert "missing quant_conv.weight" in result.stderr and "Traceback" not in result.stderr


# Kills ------------------------------------------------------------------------------------


def _command(file, *options):
  return [sys.executable, "-m", "videogpt_jax.encode", f"--config={file}",
          "--config.platform=cpu", *options]


def _interrupt(file, out, kills, moments):
  """Kills the command at random moments until it was killed so often, then lets it finish.

  In turns: soon after it has written another shard, while it writes the first, and while it
  starts. Returns for every kill how many shards were whole. No process may survive one.
  """
  whole = lambda: len(list(out.glob("*.array_record*")))
  begun = lambda: len(list((out / ".partial").glob("*.tmp-*")))
  record = []
  while len(record) < kills:
    before, turn, deadline = whole(), len(record) % 4, time.monotonic() + 120
    process = subprocess.Popen(_command(file), stdout=subprocess.DEVNULL)
    while turn != 3 and process.poll() is None:
      if begun() and (turn == 1 or whole() > before):
        break
      assert time.monotonic() < deadline
      time.sleep(0.01)
    time.sleep(moments.uniform(0, (0.5, 3.0, 0.5, 5.0)[turn]))
    if process.poll() is None:
      children = psutil.Process(process.pid).children(recursive=True)
      process.kill()
      process.wait()
      _, alive = psutil.wait_procs(children, timeout=10)
      assert not alive
      record.append(whole())
    else:  # it was faster: begin anew
      assert process.returncode == 0
      shutil.rmtree(out)
  subprocess.run(_command(file), stdout=subprocess.DEVNULL, check=True)
  return record


def test_killed_and_run_again_the_data_set_is_the_same(few, tmp_path):
  folder, _, whole = few
  out = tmp_path / "killed"
  file = tiny_run.config_file(_config(folder / "videos", out), tmp_path / "c.py")
  assert any(_interrupt(file, out, 3, random.Random(0)))  # not only before there was anything
  assert _content(out) == _content(whole)
  assert not (out / ".partial").exists()


@pytest.mark.soak
def test_twenty_kills_of_two_hundred_videos(tmp_path, monkeypatch):
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS"):
    monkeypatch.delenv(name, raising=False)  # as a user starts it
  zoo.make(tmp_path / "videos", 200)
  file = tiny_run.config_file(_config(tmp_path / "videos", tmp_path / "whole"), tmp_path / "a.py")
  began = time.monotonic()
  done = subprocess.run(_command(file), capture_output=True, text=True, check=True)
  whole_run = time.monotonic() - began
  two = tiny_run.config_file(_config(tmp_path / "videos", tmp_path / "two"), tmp_path / "b.py")
  jobs = [subprocess.Popen(_command(two, f"--shard={i}/2")) for i in range(2)]
  assert [job.wait() for job in jobs] == [0, 0]
  assert _content(tmp_path / "two") == _content(tmp_path / "whole")
  seed = random.SystemRandom().randrange(2**32)
  killed = tiny_run.config_file(_config(tmp_path / "videos", tmp_path / "killed"),
                                tmp_path / "c.py")
  record = _interrupt(killed, tmp_path / "killed", 20, random.Random(seed))
  assert any(record)
  assert _content(tmp_path / "killed") == _content(tmp_path / "whole")
  lines = [line for line in done.stdout.splitlines() if line.startswith("encode ")]
  progress = [line for line in lines if "| decode " in line][-1]
  report.finish({
    "benchmark": "encode_soak", "videos": 200, "usable": 200 - len(zoo.BAD),
    "seconds_undisturbed": round(whole_run, 1), "utilisation": progress,
    "summary": [line.replace(f"{tmp_path}/", "") for line in done.stdout.splitlines()
                if "| decode " not in line],
    "rejected": collections.Counter(
      encode.kind(reason) for reason in _rejected(tmp_path / "whole").values()),
    "kills": len(record), "whole_shards_at_each_kill": record, "seed": seed,
    "same_bytes_after_kills": True, "same_bytes_of_two_processes": True,
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "day": datetime.date.today().isoformat(),
  }, "", str(ROOT / "benchmarks" / "results" / "encode_soak.json"))
