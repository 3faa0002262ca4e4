"""The main job: a physics world small enough to learn on a laptop, in minutes."""

from videogpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.name = "tiny"
  c.data.path = "data/tiny"
  c.data.source = "world"
  c.data.height = c.data.width = 32
  c.data.frames = 8
  c.data.train_videos = 6000
  c.data.validation_videos = 256
  c.world.size = 32
  c.world.frames = 8
  c.world.objects = (1, 2)
  return c
