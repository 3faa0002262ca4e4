"""Stage 1 of 4 of the published pretraining: 16 frames, one frame a clip.

    python -m videogpt_jax.convert --checkpoint=PHI3 --out=runs/phi3 \
        --diff_id=32011 --img_id=32012 --end_img_id=32013
    python -m videogpt_jax.encode --config=configs/stage1.py --videos=FOLDER --vae=PATH
    python -m videogpt_jax.main --config=configs/stage1.py --workdir=runs/stage1

and then configs/stage2.py to stage4.py on the same data, each from the weights of the stage
before. The same four stages with a small model on the simulated world, in some minutes on a
laptop: `--config=configs/stage1.py:small` (and so on), into `--workdir=runs/stage1_small`.

Mesh and microbatches are those for 64 devices, a v5p-128 (4x4x4) or eight nodes of eight H100s: the
state is split over 8 of them, each computes 5 videos at once here and one in the other stages. On
another number, set config.train.accumulation, and see what a device would hold before anything
runs, on any machine (docs/scaling.md):

    python -m videogpt_jax.main --config=configs/stage1.py --dry_run --topology=h100:8x8

How long a stage lasts is not published. Ours: about 1e11 tokens a stage, which at a global
batch of 320 videos is 50,000 steps here, 15,000 in stages 2 and 3, and 9,000 in stage 4.
"""

from videogpt_jax import presets


def get_config(variant: str = ""):
  c = presets.stage(1, variant)
  c.clips.partition = "single"
  c.sample.clip_frames = 1
  if variant:
    c.data.frames = 4
    c.train.steps = 2000
  else:
    c.data.frames = 16
    c.data.interval = (4, 4)
    c.train.steps = 50_000
    c.checkpoint.init_from = "runs/phi3"  # "": the backbone from scratch, too
  return c
