"""A small data set in Physics-IQ's format, and videos as if somebody had generated them."""

import shutil

import cv2
import numpy as np

from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.evaluation import physics_mini
from videogpt_jax.metrics.physics_iq.protocol import Protocol

PROTOCOL = Protocol(fps=8, conditioning_s=0.5, prediction_s=1.0, scenarios=2)
WORLD = world.Settings(size=32, frames=12, objects=(1, 1), speed=(2.0, 2.5))


def write(folder):
  """Writes the data set: two scenarios, 128 px, 8 frames to predict; returns its protocol."""
  physics_mini.write_dataset(WORLD, PROTOCOL, folder, seed=0)
  return PROTOCOL


def second_takes(data, folder):
  """Copies the second takes: a perfect model's videos."""
  folder.mkdir()
  takes = sorted((data / "split-videos/testing/8FPS").iterdir())[6:]
  for number, path in enumerate(takes, start=1):
    shutil.copyfile(path, folder / f"{number:04d}_perspective.mp4")
  return folder


def as_opencv_writes(folder, to):
  """Copies videos as MPEG-4 Part 2, which browsers do not play."""
  to.mkdir()
  for path in folder.iterdir():
    frames = video.read(path).frames
    writer = cv2.VideoWriter(str(to / path.name), cv2.VideoWriter_fourcc(*"mp4v"), PROTOCOL.fps,
                             frames.shape[2:0:-1])
    for frame in frames:
      writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
  return to
