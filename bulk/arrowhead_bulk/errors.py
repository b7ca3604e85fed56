# SPDX-License-Identifier: Apache-2.0
"""Every error a bulk job raises on purpose; the message is one line, fit to be shown to a user.

BulkError
├── BadCorpus       files that are not there, cannot be read, or have no such column
├── BadModel        no such model, or another than the job began with
├── OtherJob        the folder holds the vectors of another job, or of one that runs
├── Incomplete      parts are missing, torn, or do not add up
└── Stalled         nothing was done for too long
"""


class BulkError(Exception):
    """Base of the tree; `exit_code` is what the command line exits with."""

    exit_code = 1


class BadCorpus(BulkError):
    """The files are not there, cannot be read, or have no such column."""


class BadModel(BulkError):
    """There is no such model, or it is another than the job began with."""


class OtherJob(BulkError):
    """The folder holds something else, or somebody is at work there."""


class Incomplete(BulkError):
    """Parts are missing, torn, or do not add up."""


class Stalled(BulkError):
    """No unit was done for too long."""
