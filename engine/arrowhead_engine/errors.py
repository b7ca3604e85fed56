# SPDX-License-Identifier: Apache-2.0
"""Every error the engine raises on purpose, one class a cause.

EngineError
├── WeightFileError          the file is not a sound weight file (docs/format.md)
│   ├── NotAWeightFile         empty, not Parquet, or Parquet of another kind
│   ├── TruncatedFile          begins as Parquet, ends in the middle
│   ├── UnsupportedVersion     written by a newer Arrowhead
│   ├── BadSchema              columns or row groups are not as specified
│   ├── DuplicateTensor        one name twice
│   ├── BadDtype               a dtype the format does not know
│   ├── BadShape               negative, or not num_params elements
│   ├── SizeMismatch           data is not shape x dtype bytes long
│   ├── BadOffset              data lies where it must not
│   └── ChecksumMismatch       data was changed after it was written
├── UnsupportedModel         a sound file, but a model this engine cannot run faithfully
├── WeightsMismatch          tensors missing, unexpected, or of another shape than the model's
├── CertificateMismatch      the engine does not reproduce the vectors certified at conversion
└── InvalidInput             the caller's text or token ids; its neighbours are not affected
"""


class EngineError(Exception):
    """Base of the engine's errors. The message is one line, fit to be shown to a user."""

    exit_code = 1

    def __str__(self) -> str:
        # A file's own words may be in it, and a library's, which come in several lines.
        line = " ".join(super().__str__().split())
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line[:1000])


class WeightFileError(EngineError):
    """The file is not a sound weight file."""


class NotAWeightFile(WeightFileError):
    """Empty, not Parquet, or Parquet of another kind."""


class TruncatedFile(WeightFileError):
    """Begins as Parquet and ends in the middle."""


class UnsupportedVersion(WeightFileError):
    """The file's format version is not one this reader knows."""


class BadSchema(WeightFileError):
    """Columns or row groups are not as specified."""


class DuplicateTensor(WeightFileError):
    """One tensor name stands twice in the file."""


class BadDtype(WeightFileError):
    """A dtype the format does not know."""


class BadShape(WeightFileError):
    """A negative dimension, or a shape that does not hold `num_params` elements."""


class SizeMismatch(WeightFileError):
    """The data is not shape x dtype bytes long."""


class BadOffset(WeightFileError):
    """The data lies outside the file, over other bytes, or off its 64-byte boundary."""


class ChecksumMismatch(WeightFileError):
    """The data was changed after it was written."""


class UnsupportedModel(EngineError):
    """A model this engine cannot run faithfully."""


class WeightsMismatch(EngineError):
    """Tensors are missing, unexpected, or of another shape than the model's."""


class CertificateMismatch(EngineError):
    """The engine does not reproduce the vectors certified at conversion."""


class InvalidInput(EngineError):
    """The caller's text or token ids cannot be embedded."""
