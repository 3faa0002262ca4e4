"""Needed work, against counts by hand from the dense mask."""

import numpy as np

from videogpt_jax import backbone
from videogpt_jax import flops
from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax import model


def test_a_clip_counts_the_history_once_and_the_clip_in_every_prediction():
  stack = backbone.Config(hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2,
                          num_kv_heads=1)
  config = model.Config(backbone=stack, channels=5)
  history, generated, cells = 3, 2, (4, 6)  # 6 patches, 8 tokens a frame
  ranks = mask.ranks(layout.tokens(layout.prediction(history, generated), 6))
  dense = np.asarray(mask.visible(ranks, ranks))[0]
  past, new = dense[:24].sum(), dense[24:].sum()
  own = dense[24:, 24:].sum()
  token = 2 * 3 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12)  # q and o; k and v of half the heads; MLP
  pair, patch = 4 * 3 * 8, 2 * 5 * 4 * 8
  encoded = 24 * token + past * pair + history * 6 * patch
  step = 16 * token + 2 * generated * 6 * patch  # patches in, patches out
  count = lambda **kwargs: flops.clip(config, history, generated, cells, **kwargs)
  assert count(evaluations=1) == encoded + step + new * pair
  assert count(evaluations=5, guided_evaluations=4) == (
    encoded + 5 * (step + new * pair) + 4 * (step + own * pair))
  assert count(evaluations=5, recomputed=True) == 5 * (encoded + step + new * pair)
