"""Your own videos, at 64x64: a start for a small GPU or a patient laptop.

    python -m videogpt_jax.encode --config=configs/videos.py --videos=FOLDER
    python -m videogpt_jax.main --config=configs/videos.py --workdir=runs/videos
    python -m videogpt_jax.predict --checkpoint=runs/videos --video=clip.mp4
"""

from videogpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.name = "videos"
  c.data.path = "data/videos"
  c.data.source = "videos"
  c.data.height = c.data.width = 64
  c.data.frames = 16
  c.data.interval = (1, 4)
  c.data.workers = 2
  c.codec.block = 4
  c.model.hidden_size = 384
  c.model.intermediate_size = 1024
  c.model.num_layers = 8
  c.model.num_heads = c.model.num_kv_heads = 6
  c.train.steps = 100_000
  c.train.batch_size = 16
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 1000
  c.checkpoint.every = 1000
  c.log.validate_every = 1000
  c.log.videos_every = 5000
  return c
