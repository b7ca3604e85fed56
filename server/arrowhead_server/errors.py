# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a server. Every message is one line: what was met, and what to do next.

ServerError
├── RepositoryError        nothing to serve, or weights not converted yet
│   └── NotSignedError     a version without a signature of the key that is wanted
├── TritonNotFoundError    no Triton on this machine, or one that cannot run here
├── PortInUseError         somebody else listens on a port we were given
├── StartError             Triton or a model did not come up
└── CrashLoopError         it came up once, then failed to come back several times in a row
"""


class ServerError(Exception):
    """Base of the tree; the command line prints the message and exits with `exit_code`."""

    exit_code: int = 1


class RepositoryError(ServerError):
    """The model repository cannot be served as it is."""


class NotSignedError(RepositoryError):
    """A version is not signed, or its files are not those that were."""


class TritonNotFoundError(ServerError):
    """No Triton that can run on this machine and this Python."""


class PortInUseError(ServerError):
    """A port is taken."""


class StartError(ServerError):
    """Triton ended, or did not become ready in time."""


class CrashLoopError(ServerError):
    """Restarting failed several times in a row."""
