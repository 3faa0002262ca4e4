"""Which tokens a sequence holds: partitions into clips, streams, frames, roles, positions.

The axes used across the package, in every signature and einsum:

  B batch            N frames of a sample        K clips of a sample
  M frame blocks     P patches of a frame        S tokens of a block, P + 2
  L tokens           D hidden size               F MLP size
  H query heads      G key/value heads           E head size
  h w latent cells   C latent channels           V vocabulary

A video of N frames is cut into K clips, represented as `clip[B, N]`: the clip index of
each frame, which starts at 0 and steps by 0 or 1. A frame may stand in the sequence
twice: as a clean block `[<img>, P patches, </img>]` and as a noisy block
`[<diff>, time, P patches]`, both of S = P + 2 tokens. Token o of frame i has position
`i * S + o` in both streams.

The published implementation interleaves the clips' noisy and clean blocks. Mask and
positions depend only on a token's (stream, clip, frame, role), so any order computes
the same; here all clean blocks come first, then all noisy ones: shapes do not depend on
the partition, and blocks that attend to each other are contiguous.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

CLEAN, NOISY, PREFIX = 0, 1, 2  # streams
MARKERS = 2  # tokens of a block that are not patches


@flax.struct.dataclass
class FrameBlocks:
  """The frame blocks of a sequence, in physical order; see `frame_blocks`."""

  stream: Int[Array, "B M"]
  clip: Int[Array, "B M"]
  frame: Int[Array, "B M"]
  clip_start: Int[Array, "B M"]  # first frame of the block's clip
  valid: Bool[Array, "B M"]


@flax.struct.dataclass
class Tokens:
  """The tokens of a sequence, in physical order; see `tokens`."""

  stream: Int[Array, "B L"]
  clip: Int[Array, "B L"]
  frame: Int[Array, "B L"]  # prefix token j of n: j - n
  clip_start: Int[Array, "B L"]
  role: Int[Array, "B L"]  # order inside a block
  position: Int[Array, "B L"]  # rotary position
  valid: Bool[Array, "B L"]


# Partitions -------------------------------------------------------------------------------


def random_partition(rng: PRNGKeyArray, frames: int) -> Int[Array, "N"]:
  """Clip indices of a random partition (paper, section 3.2).

  Draws K uniformly from {2..N}, then K - 1 distinct cuts uniformly from the N - 1 gaps.

  Args:
    rng: key of this sample.
    frames: N, at least 2.
  """
  return _cut(rng, random_count(rng, frames), frames)


def random_partitions_of_one_count(
    rng: PRNGKeyArray, frames: int) -> Int[Array, "B N"]:
  """Random partitions of several samples into as many clips each.

  Every sample has the law of `random_partition`, but attention has about as much to do in all
  of them: how much there is depends on K.

  Args:
    rng: one key per sample.
    frames: N, at least 2.
  """
  clips = random_count(rng[0], frames)
  return jax.vmap(lambda key: _cut(key, clips, frames))(rng)


def random_count(rng: PRNGKeyArray, frames: int) -> Int[Array, ""]:
  """K, uniform on {2..N}."""
  if frames < 2:
    raise ValueError(f"a random partition needs at least 2 frames, got {frames}")
  return jax.random.randint(jax.random.split(rng)[0], (), 2, frames + 1)


def _cut(rng: PRNGKeyArray, clips: Int[Array, ""], frames: int) -> Int[Array, "N"]:
  rng_cuts = jax.random.split(rng)[1]
  order = jax.random.permutation(rng_cuts, frames - 1)
  cuts = order < clips - 1  # a random subset of K - 1 gaps
  return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(cuts, dtype=jnp.int32)])


def single_partition(frames: int) -> Int[Array, "N"]:
  """One frame a clip: next frame prediction, the first stage of training."""
  return jnp.arange(frames, dtype=jnp.int32)


def fixed_partition(lengths: tuple[int, ...]) -> Int[Array, "N"]:
  """Clips of the given lengths, in order; N is their sum."""
  if not lengths or min(lengths) < 1:
    raise ValueError(f"clip lengths must be positive, got {lengths}")
  return jnp.repeat(jnp.arange(len(lengths), dtype=jnp.int32), jnp.array(lengths),
                    total_repeat_length=sum(lengths))


# Frame blocks -----------------------------------------------------------------------------


def frame_blocks(
    stream: Int[Array, "B M"],
    clip: Int[Array, "B M"],
    frame: Int[Array, "B M"],
    valid: Bool[Array, "B M"] | None = None,
) -> FrameBlocks:
  """Frame blocks in any order, from which every task builds its sequence.

  A clip is a run of frames; its first one is found among the valid blocks of both
  streams. All clean blocks of clips before a noisy block's own are its history.
  """
  chex.assert_equal_shape([stream, clip, frame])
  if valid is None:
    valid = jnp.ones(stream.shape, bool)
  same_clip = (clip[:, :, None] == clip[:, None, :]) & valid[:, None, :]
  latest = jnp.iinfo(jnp.int32).max
  start = jnp.min(jnp.where(same_clip, frame[:, None, :], latest), axis=-1)
  start = jnp.where(valid, start, frame)
  return FrameBlocks(stream=stream, clip=clip, frame=frame, clip_start=start, valid=valid)


def training(
    clip: Int[Array, "B N"], valid: Bool[Array, "B N"] | None = None, *, last_clip: int = 1
) -> FrameBlocks:
  """Every frame noisy, and clean where a later clip can see it.

  The last clip's clean blocks would be seen by nobody. The last frame always belongs to
  it, so the clean stream is frames 0..N-2, statically, with the rest of the last clip's
  marked invalid. M = 2N - last_clip: the clean blocks first.

  Args:
    clip: clip index of each frame.
    valid: false for frames that pad a shorter video.
    last_clip: how many frames the last clip is known to have, at least.
  """
  if valid is None:
    valid = jnp.ones(clip.shape, bool)
  chex.assert_equal_shape([clip, valid])
  last = jnp.max(jnp.where(valid, clip, -1), axis=1, keepdims=True)
  seen_later = valid & (clip < last)
  frame = jnp.broadcast_to(jnp.arange(clip.shape[1], dtype=jnp.int32), clip.shape)
  both = lambda clean, noisy: jnp.concatenate([clean[:, :-last_clip], noisy], axis=1)
  return frame_blocks(
      stream=both(jnp.full_like(clip, CLEAN), jnp.full_like(clip, NOISY)),
      clip=both(clip, clip),
      frame=both(frame, frame),
      valid=both(seen_later, valid),
  )


def prediction(history: int, generated: int, batch: int = 1) -> FrameBlocks:
  """`history` clean frames (one past clip), then one clip of `generated` noisy frames.

  `history` 0 is the unconditional branch of guidance. M = history + generated.
  """
  frame = jnp.arange(history + generated, dtype=jnp.int32)
  is_new = (frame >= history).astype(jnp.int32)
  rows = lambda x: jnp.broadcast_to(x, (batch, history + generated))
  stream = jnp.where(is_new, NOISY, CLEAN).astype(jnp.int32)
  return frame_blocks(stream=rows(stream), clip=rows(is_new), frame=rows(frame))


def window(
    first: Int[Array, ""], count: Int[Array, ""], slots: int, batch: int = 1
) -> FrameBlocks:
  """The clean frames that a cache keeps in a ring of `slots` frame blocks. M = slots.

  Slot `first` holds frame 0, the slots after it (and on from slot 0) the `count` - 1 next
  ones; the others are invalid. Frames count from the oldest kept one, however many left.
  """
  frame = (jnp.arange(slots, dtype=jnp.int32) - first) % max(1, slots)
  rows = lambda x: jnp.broadcast_to(x, (batch, slots))
  zeros = jnp.zeros((batch, slots), jnp.int32)
  return frame_blocks(stream=zeros + CLEAN, clip=zeros, frame=rows(frame),
                      valid=rows(frame < count))


def appended(history: Int[Array, ""] | int, frames: int, batch: int = 1) -> FrameBlocks:
  """`frames` clean frames that follow `history` earlier ones, which stand elsewhere."""
  frame = jnp.broadcast_to(history + jnp.arange(frames, dtype=jnp.int32), (batch, frames))
  zeros = jnp.zeros_like(frame)
  return frame_blocks(stream=zeros + CLEAN, clip=zeros, frame=frame)


def next_clip(
    history: Int[Array, ""] | int, generated: int, batch: int = 1, *, guided: bool = False
) -> FrameBlocks:
  """One noisy clip after `history` clean frames, which stand elsewhere (all of one past clip).

  With `guided` the clip follows once more, as one that has no history and begins at frame 0:
  the unconditional branch of guidance. M = generated, or twice that.
  """
  frame = jnp.arange(generated, dtype=jnp.int32)
  clip = jnp.ones_like(frame)
  frames, clips = (([history + frame, frame], [clip, clip + 1]) if guided
                   else ([history + frame], [clip]))
  rows = lambda x: jnp.broadcast_to(jnp.concatenate(x), (batch, generated * len(x)))
  return frame_blocks(stream=rows([clip * 0 + NOISY] * len(clips)), clip=rows(clips),
                      frame=rows(frames))


# Tokens -----------------------------------------------------------------------------------


def tokens(
    blocks: FrameBlocks,
    patches: int,
    prefix_length: Int[Array, "B"] | None = None,
    *,
    prefix_size: int = 0,
    multiple: int = 1,
) -> Tokens:
  """The tokens of `blocks`: L = prefix_size + M * S, padded at the end to a multiple.

  A condition prefix of n tokens (downstream tasks: class, text) takes positions 0..n-1
  and shifts all frames' positions by n.

  Args:
    blocks: frame blocks in physical order.
    patches: P, patches of a frame.
    prefix_length: n of each sample, at most `prefix_size`; the slots after it are invalid.
    prefix_size: slots reserved for the prefix, in front.
    multiple: L is padded with invalid tokens to a multiple of this.
  """
  batch, _ = blocks.stream.shape
  size = patches + MARKERS
  if prefix_length is None:
    prefix_length = jnp.zeros(batch, jnp.int32)
  offset = jnp.arange(size, dtype=jnp.int32)
  clean_role = (offset > 0).astype(jnp.int32) + (offset == size - 1)
  noisy_role = jnp.minimum(offset, 2)

  spread = lambda x: jnp.repeat(x, size, axis=1)
  role = jnp.where(blocks.stream[:, :, None] == NOISY, noisy_role, clean_role)
  position = prefix_length[:, None, None] + blocks.frame[:, :, None] * size + offset
  body = Tokens(
      stream=spread(blocks.stream),
      clip=spread(blocks.clip),
      frame=spread(blocks.frame),
      clip_start=spread(blocks.clip_start),
      role=role.reshape(batch, -1),
      position=position.reshape(batch, -1),
      valid=spread(blocks.valid),
  )
  length = prefix_size + body.stream.shape[1]
  parts = [_prefix_tokens(prefix_length, prefix_size), body, _padding(batch, -length % multiple)]
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def _prefix_tokens(length: Int[Array, "B"], size: int) -> Tokens:
  slot = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (length.shape[0], size))
  zeros = jnp.zeros_like(slot)
  return Tokens(
      stream=zeros + PREFIX, clip=zeros - 1, frame=slot - length[:, None], clip_start=zeros,
      role=zeros, position=slot, valid=slot < length[:, None])


def _padding(batch: int, size: int) -> Tokens:
  zeros = jnp.zeros((batch, size), jnp.int32)
  return Tokens(stream=zeros, clip=zeros, frame=zeros, clip_start=zeros, role=zeros,
                position=zeros, valid=zeros.astype(bool))
