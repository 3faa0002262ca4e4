"""Stage 3 of 4 of the published pretraining: 48 frames, the interval between them random, too.

    python -m videogpt_jax.main --config=configs/stage3.py --workdir=runs/stage3

What comes before and after: configs/stage1.py.
"""

from videogpt_jax import presets


def get_config(variant: str = ""):
  c = presets.stage(3, variant)
  if variant:
    c.data.frames = 8
    c.data.interval = (1, 2)
    c.train.steps = 1000
  else:
    c.data.frames = 48
    c.data.interval = (4, 12)
    c.train.steps = 15_000
    c.train.accumulation = 5  # on 64 devices: one video at a time
  return c
