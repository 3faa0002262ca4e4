"""Metrics, pictures, speed and memory of a run against independent readings of each."""

import contextlib
import errno
import inspect
import io
import json
import os
import pathlib
import queue
import re
import resource
import struct
import subprocess
import sys
import textwrap
import time
import types

import jax
import numpy as np
from PIL import Image
import psutil
import pytest
from tensorboardX.proto import event_pb2

from videogpt_jax import machine
from videogpt_jax import telemetry
from videogpt_jax.errors import InputError
from videogpt_jax.telemetry import device_clock
from videogpt_jax.telemetry import goodput


def _lines(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _crc32c(data: bytes) -> int:
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def _events(workdir: pathlib.Path) -> list[event_pb2.Event]:
  """Reads event files as TensorBoard does: length, its masked crc, data, its masked crc."""

  def check(data: bytes, stored: int) -> None:
    crc = _crc32c(data)
    assert ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == stored

  found = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    assert "tfevents" in path.name
    data = io.BytesIO(path.read_bytes())
    while header := data.read(12):
      check(header[:8], struct.unpack("<I", header[8:])[0])
      body = data.read(struct.unpack("<Q", header[:8])[0])
      check(body, struct.unpack("<I", data.read(4))[0])
      found.append(event_pb2.Event.FromString(body))
  return found


def test_scalars_reach_both_files_at_once(tmp_path):
  writer = telemetry.Writer(tmp_path)
  writer.scalars(1, {"loss": 0.5, "lr": np.float32(0.25)})
  writer.scalars(2, {"loss": 0.125})
  # nothing is flushed or closed by the test: a kill now must lose nothing
  assert _lines(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 0.25}, {"step": 2, "loss": 0.125}]
  seen = [(e.step, v.tag, v.simple_value) for e in _events(tmp_path) for v in e.summary.value]
  assert seen == [(1, "loss", 0.5), (1, "lr", 0.25), (2, "loss", 0.125)]
  writer.close()


def test_a_loss_that_is_not_finite_keeps_the_file_readable(tmp_path):
  writer = telemetry.Writer(tmp_path)
  writer.scalars(1, {"loss": float("nan"), "gnorm": float("inf"), "lr": 1.0})
  writer.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text, parse_constant=pytest.fail) == {
    "step": 1, "loss": None, "gnorm": None, "lr": 1.0
  }  # fmt: skip
  values = [v.simple_value for e in _events(tmp_path) for v in e.summary.value]
  assert np.isnan(values[0]) and np.isinf(values[1])


def test_resuming_rewrites_the_tail_and_only_that(tmp_path):
  writer = telemetry.Writer(tmp_path)
  for step in range(1, 6):
    writer.scalars(step, {"loss": step / 7})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "lo')  # a kill in the middle of a line
  writer = telemetry.Writer(tmp_path, start_step=3)
  assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
  writer.scalars(3, {"loss": 30.0})
  writer.close()
  assert _lines(tmp_path) == [
    {"step": 1, "loss": 1 / 7}, {"step": 2, "loss": 2 / 7}, {"step": 3, "loss": 30.0}
  ]  # fmt: skip
  starts = [e.step for e in _events(tmp_path) if e.HasField("session_log")]
  assert starts == [0, 3]
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # none overwritten within a second


def test_a_metrics_file_with_another_broken_line_is_refused(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(InputError, match=r"metrics.jsonl, line 2 is not JSON"):
    telemetry.Writer(tmp_path, start_step=2)


def test_a_video_is_a_gif_on_disk_and_in_tensorboard(tmp_path):
  frames = np.zeros((5, 8, 12, 3), np.uint8)
  for t in range(5):
    frames[t, :, 2 * t : 2 * t + 2] = (255, 0, 0)
  writer = telemetry.Writer(tmp_path)
  path = writer.video(30, "validation/sample", frames, fps=10.0, scale=2)
  writer.close()
  assert path == tmp_path / "videos" / "validation_sample_30.gif"
  with Image.open(path) as gif:
    assert (gif.n_frames, gif.size, gif.info["duration"]) == (5, (24, 16), 100)
    for t in range(5):
      gif.seek(t)
      pixels = np.asarray(gif.convert("RGB")).astype(int)[::2, ::2]
      assert np.abs(pixels - frames[t]).max() < 30
  (event,) = [e for e in _events(tmp_path) if e.summary.value]
  (value,) = event.summary.value
  assert (event.step, value.tag) == (30, "validation/sample")
  assert (value.image.height, value.image.width) == (16, 24)
  assert value.image.encoded_image_string == path.read_bytes()


def test_an_image_is_a_png_on_disk_and_in_tensorboard(tmp_path):
  pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  writer = telemetry.Writer(tmp_path)
  path = writer.image(7, "mask", pixels)
  writer.close()
  np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
  (event,) = [e for e in _events(tmp_path) if e.summary.value]
  data = event.summary.value[0].image.encoded_image_string
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


def test_a_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"cannot write to .*file/run"):
    telemetry.Writer(tmp_path / "file" / "run")


@contextlib.contextmanager
def _largest_file(size: int):
  """Stands in for a full disk: the system refuses to write beyond `size` bytes of a file."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_warned_of_once_and_the_run_goes_on(tmp_path, caplog):
  """Until it has room again; every line that is there is whole."""
  writer = telemetry.Writer(tmp_path)
  with _largest_file(2000):
    for step in range(1000):  # a writer that blocks would never come to the end
      writer.scalars(step, {"loss": 1.0})
      writer.timing({"step": step})
    writer.image(999, "noise", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
  for kind in ("metrics", "times", "images"):
    assert caplog.text.count(f"cannot write {kind} to") == 1
  assert "too large" in caplog.text
  writer.scalars(1000, {"loss": 2.0})
  writer.close()
  records = telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE)
  assert records[0] == {"step": 0, "loss": 1.0} and records[-1] == {"step": 1000, "loss": 2.0}


def test_what_is_synced_is_handed_over(tmp_path, monkeypatch, caplog):
  """And a file system that refuses that does not end the run."""
  writer, synced = telemetry.Writer(tmp_path), []
  monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(
    f"/proc/self/fd/{number}")))
  writer.sync()
  assert synced == [str(tmp_path / telemetry.METRICS_FILE), str(tmp_path / "time.jsonl")]

  def refuse(number):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(os, "fsync", refuse)
  writer.sync()
  assert "cannot write metrics to" in caplog.text
  writer.close()


class Clock:
  def __init__(self) -> None:
    self.now = 1000.0

  def __call__(self) -> float:
    return self.now


def _seconds(**phases):
  return dict.fromkeys(goodput.PHASES, 0.0) | phases


def test_speed_is_of_the_time_of_steps_between_log_points():
  clock = Clock()
  progress = telemetry.Progress(
    100, tokens_per_step=50, flops_per_step=3e9, peak_flops=1e12, clock=clock
  )
  clock.now += 7  # compilation and the first step
  progress.start(1)
  clock.now += 2
  speed = progress.update(11, 10, _seconds(compile=7, step=1.5, data_wait=0.5))
  assert speed["step_s"] == pytest.approx(0.2)
  assert speed["steps_per_s"] == pytest.approx(5)
  assert speed["tokens_per_s"] == pytest.approx(250)
  assert speed["mfu"] == pytest.approx(5 * 3e9 / 1e12)
  assert speed["data_wait"] == pytest.approx(0.25)
  assert speed["eta_s"] == pytest.approx(89 * 0.2)
  clock.now += 7
  speed = progress.update(21, 10, _seconds(step=0.6, lost=0.4, evaluation=4, checkpoint=2))
  assert speed["steps_per_s"] == pytest.approx(10)  # the pause is not slowness
  assert speed["eta_s"] == pytest.approx(79 * 9 / 20)  # but pauses will come again
  assert speed["data_wait"] == 0


def test_a_step_that_compiled_has_no_speed():
  clock = Clock()
  progress = telemetry.Progress(100, tokens_per_step=50, clock=clock)
  speed = progress.update(1, 0, _seconds(compile=7, step=0.01))
  assert (speed["steps_per_s"], speed["eta_s"]) == (0, float("inf"))
  assert "step_s" not in speed
  assert "| 0 tok/s | wait 0.0% |" in progress.line(1, {}, speed)


def test_the_line_is_greppable():
  clock = Clock()
  progress = telemetry.Progress(
    2000, tokens_per_step=100, flops_per_step=1e9, peak_flops=1e11, clock=clock
  )
  progress.start(0)
  clock.now += 10
  speed = progress.update(120, 120, _seconds(step=9.98, data_wait=0.02)) | {
    "host_rss_mib": 912.4, "goodput": 0.876, "checkpoint_s": 0.0, "evaluation_s": 0.0}
  values = {"loss": 0.01234, "gnorm": 0.53, "lr": 1e-3}
  start = ("step 120/2000   6.0% | loss 0.01234 | gnorm 0.53 | lr 1.00e-03 | 83.33 ms"
           " | 1200 tok/s | mfu 12% | wait 0.2%")
  assert progress.line(120, values, speed) == (
    f"{start} | good 88% | rss 912 MiB | eta 2m37s")
  speed |= {"checkpoint_s": 1.23, "evaluation_s": 4.0, "device_mib": 3000.2,
            "device_peak_mib": 4000.0}
  assert progress.line(120, values, speed) == (
    f"{start} | save 1.2 s | eval 4.0 s | good 88% | device 3000 (peak 4000) MiB | rss 912 MiB"
    " | eta 2m37s")


def test_without_a_known_peak_there_is_no_mfu():
  clock = Clock()
  progress = telemetry.Progress(10, tokens_per_step=1, flops_per_step=1e9, clock=clock)
  speed = progress.update(1, 1, _seconds(step=1.0))
  assert "mfu" not in speed
  assert "mfu" not in progress.line(1, {"loss": float("nan")}, speed)
  assert "loss nan" in progress.line(1, {"loss": float("nan")}, speed)


def test_memory_of_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  assert machine.device_memory_mib() == {}  # a CPU does not tell
  stats = [{"bytes_in_use": 3 << 20, "peak_bytes_in_use": 5 << 20, "num_allocs": 1},
           {"bytes_in_use": 2 << 20, "peak_bytes_in_use": 9 << 20}]
  monkeypatch.setattr(jax, "local_devices", lambda: [Device(x) for x in stats])
  assert machine.device_memory_mib() == {"device_mib": 3.0, "device_peak_mib": 9.0}
  del stats[1]["peak_bytes_in_use"]
  assert machine.device_memory_mib() == {"device_mib": 3.0}


def test_the_device_is_busy_until_its_newest_result_is_there(monkeypatch):
  clock, finished = Clock(), queue.Queue()
  monkeypatch.setattr(jax, "block_until_ready", lambda result: result.get(timeout=20))
  device = device_clock.DeviceClock(clock)
  assert device.busy(since=900.0) == 0  # it has nothing to do yet
  device.watch(finished)
  clock.now += 5
  assert device.busy(since=1002.0) == 3
  finished.put(None)
  _let(lambda: device._finished is not None)
  clock.now += 50  # idle
  assert device.busy(since=1002.0) == 3
  assert device.busy(since=1030.0) == 0
  device.watch(finished)
  clock.now += 1
  assert device.busy(since=1030.0) == 26
  finished.put(None)
  device.close()


def _let(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_processes_but_the_first_write_nothing(tmp_path, monkeypatch, capsys):
  """They have a writer with the same methods, so that the loop need not ask."""
  methods = lambda kind: {
    name: str(inspect.signature(method)) for name, method in inspect.getmembers(kind)
    if inspect.isfunction(method) and not name.startswith("_")}
  assert methods(telemetry.Silent) == methods(telemetry.Writer)
  frames, pixels = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
  paths = []
  for process, workdir in enumerate((tmp_path / "first", tmp_path / "second")):
    monkeypatch.setattr(jax, "process_index", lambda n=process: n)
    writer = telemetry.open_writer(workdir, project="" if process == 0 else "not even looked for")
    writer.scalars(1, {"loss": 1.0})
    writer.timing({"step": 1})
    paths.append([writer.video(1, "a/b", frames, 8.0).relative_to(workdir),
                  writer.image(1, "c", pixels).relative_to(workdir)])
    writer.say(f"process {process}")
    assert writer.timings() == [{"step": 1}][process:]
    writer.close()
  assert paths[0] == paths[1]
  assert (tmp_path / "first" / paths[0][0]).is_file()
  assert not (tmp_path / "second").exists()
  assert capsys.readouterr().out == "process 0\n"


def test_records_of_time_outlive_the_steps_that_were_lost(tmp_path):
  for start, step in ((1, 8), (5, 6)):
    writer = telemetry.Writer(tmp_path, start)
    writer.timing({"step": step})
    writer.scalars(step, {"loss": 1.0})
    writer.close()
    with (tmp_path / "time.jsonl").open("a") as file:
      file.write('{"step": 3')  # a kill in the middle of a line
  assert telemetry.Writer(tmp_path, 7).timings() == [{"step": 8}, {"step": 6}]
  assert [line["step"] for line in _lines(tmp_path)] == [6]


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (80, "1m20s"), (7500, "2h05m"), (273600, "3d04h"),
   (float("inf"), "?"), (-3, "0s")],
)  # fmt: skip
def test_duration(seconds, text):
  assert telemetry.duration(seconds) == text


def test_memory_is_that_of_this_process_and_its_children():
  before = machine.host_rss_mib()
  block = np.ones(100 * 2**20, np.uint8)
  assert 90 < machine.host_rss_mib() - before < 140
  del block
  assert machine.host_rss_mib() - before < 60
  child = subprocess.Popen(
    [sys.executable, "-c", "x = b'1' * (300 << 20); print(1, flush=True); input()"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  child.stdout.readline()
  assert 290 < machine.host_rss_mib() - before < 400
  child.communicate(b"\n")


def test_what_a_compiler_freed_goes_back_to_the_system():
  """Memory that the C library keeps: many small pieces, all freed but the last."""
  program = textwrap.dedent("""
    import ctypes, jax
    from videogpt_jax import machine

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    jax.jit(lambda x: x + 1)(1.0)
    pieces = [libc.malloc(1 << 16) for _ in range(3200)]
    for piece in pieces:
      ctypes.memset(piece, 1, 1 << 16)
    for piece in pieces[:-1]:
      libc.free(piece)
    kept = machine.host_rss_mib()
    machine.free_after_compiling(60.0)
    jax.jit(lambda x: x + 2)(1.0)
    brief = machine.host_rss_mib()
    machine.free_after_compiling(0.0)
    jax.jit(lambda x: x + 3)(1.0)
    print(kept - brief, brief - machine.host_rss_mib())
  """)
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  brief, after = map(float, done.stdout.split())
  assert abs(brief) < 30 and after > 150, (brief, after)  # 200 MiB were freed


def test_peak_memory_stays_and_is_not_inherited():
  block = np.ones(200 * 2**20, np.uint8)
  high = psutil.Process().memory_info().rss / 2**20
  del block
  assert machine.peak_rss_mib() >= 0.98 * high
  script = "import videogpt_jax.machine as m; print(m.peak_rss_mib(), m.host_rss_mib())"
  peak, now = map(float, subprocess.check_output([sys.executable, "-c", script]).split())
  assert 0.98 * now <= peak < now + 100  # the kernel counts the two at different moments


@pytest.mark.parametrize("kind, rate", [
  ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12),
  ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12), ("TPU v99", None)])
def test_peak_flops_of_known_and_unknown_devices(monkeypatch, kind, rate):
  assert machine.data_sheet_flops(kind) == rate
  device = types.SimpleNamespace(device_kind=kind)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  assert machine.peak_flops() == (rate and 4 * rate)


def test_a_cpu_split_into_devices_is_no_faster(monkeypatch):
  """A share of the MFU would be lost for every device."""
  monkeypatch.setattr(machine, "product_rate", lambda size, repeats: 1e11)
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  assert machine.peak_flops() == 1e11


def test_product_rate_agrees_with_numpy():
  a = np.ones((1024, 1024), np.float32)
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    a @ a
    seconds.append(time.perf_counter() - begin)
  numpy_rate = 2 * 1024**3 / min(seconds)
  ours = machine.product_rate(1024)
  assert numpy_rate / 8 < ours < numpy_rate * 8  # they share the cores with whatever else runs


def _pixels(path: pathlib.Path) -> np.ndarray:
  return np.asarray(Image.open(path).convert("RGB"))


def test_loss_curve_shows_train_and_held_out_loss(tmp_path):
  writer = telemetry.Writer(tmp_path)
  for step in range(1, 30):
    writer.scalars(step, {"loss": 1 / step})
  writer.close()
  telemetry.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "a.png")
  writer = telemetry.Writer(tmp_path, start_step=30)
  writer.scalars(30, {"validation/loss": 0.3})
  writer.close()
  telemetry.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "plots" / "b.png")
  first, second = _pixels(tmp_path / "a.png"), _pixels(tmp_path / "plots" / "b.png")
  assert first.shape == second.shape and min(first.shape[:2]) > 300
  blue, orange = np.array([31, 119, 180]), np.array([255, 127, 14])
  near = lambda image, colour: int((np.abs(image - colour.astype(int)).max(-1) < 20).sum())
  assert near(first, blue) > 100 and near(first, orange) == 0
  assert near(second, orange) > 10


def test_no_loss_no_plot(tmp_path):
  with pytest.raises(InputError, match=r"cannot read metrics: .*metrics.jsonl"):
    telemetry.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "a.png")
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
  with pytest.raises(InputError, match="no value of 'loss'"):
    telemetry.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "a.png")
  assert not re.findall("a.png", " ".join(path.name for path in tmp_path.iterdir()))
