"""The exceptions a user is meant to read."""

import errno

# What the system refuses for these reasons it will refuse again: the user has to mend something.
_FOR_THE_USER = frozenset({
  errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
  errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS})


class InputError(ValueError):
  """Bad input: the message says what is wrong, where, and what to do about it.

  Commands print the message alone and exit with status 2 (see `videogpt_jax.cli`);
  any other exception is a defect and keeps its traceback.
  """


class StorageError(InputError):
  """Storage refuses what it did before, or what nothing speaks against: full, unreachable, broken.

  The message is read in the same way, but the same command may succeed later: commands exit with
  a status of its own, after which launchers start a run again.
  """


def refused(message: str, error: OSError) -> InputError:
  """The exception for what the system refused: a `StorageError` unless the user is at fault.

  At fault is who names a path that is not there, that is no folder or that may not be written.
  """
  return (InputError if error.errno in _FOR_THE_USER else StorageError)(message)
