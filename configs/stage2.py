"""Stage 2 of 4 of the published pretraining: 48 frames in random clips.

    python -m videogpt_jax.main --config=configs/stage2.py --workdir=runs/stage2

What comes before and after: configs/stage1.py.
"""

from videogpt_jax import presets


def get_config(variant: str = ""):
  c = presets.stage(2, variant)
  if variant:
    c.data.frames = 8
    c.data.interval = (1, 1)
    c.train.steps = 1000
  else:
    c.data.frames = 48
    c.data.interval = (4, 4)
    c.train.steps = 15_000
    c.train.accumulation = 5  # on 64 devices: one video at a time
  return c
