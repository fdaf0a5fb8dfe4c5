"""The errors that a person sees. Each message names what is at fault and says what to do.

VitscaleError
├── ConfigError       a field of a configuration, or a command line
├── DataError         a shard, a sample, an object of the store, a service that holds data
└── CheckpointError   a checkpoint, a registered version, a commit
"""


class VitscaleError(Exception):
    """Base of the three families; the command prints its message without a traceback."""


class ConfigError(VitscaleError):
    """A value that a person chose cannot work; the message names the field."""


class DataError(VitscaleError):
    """Data is missing, unreadable or not what its index says; the message names shard and key."""


class CheckpointError(VitscaleError):
    """A checkpoint or registered version cannot be trusted or used; the message names the object."""


def root_cause(error: BaseException) -> BaseException:
    """`Connection refused`, rather than what three libraries wrapped around it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
