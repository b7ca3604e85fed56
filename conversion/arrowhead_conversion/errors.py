# SPDX-License-Identifier: Apache-2.0
"""Every error a conversion raises on purpose. None of them leaves anything behind.

ConversionError
├── SourceNotFound      no such folder, package or hub model, or it cannot be reached
├── UnsupportedSource   found, but of a kind that would not be converted faithfully
├── BadWeights          tensors missing, of a wrong shape, or not finite
├── InvalidName         not a name for a model
├── Busy                another conversion to the same name is at work
├── RegistryError       no such model or version in the repository, or one that must stay
├── BadKey              a key file that cannot be used, or that others have a hand in
├── BadSignature        a version that is not signed, or whose files are not those that were
└── NotFaithful         converted, but its vectors are not the source's
"""


class ConversionError(Exception):
    """Base of the conversion's errors. The message is one line, fit to be shown to a user."""

    exit_code = 1


class SourceNotFound(ConversionError):
    """No such folder, package or hub model, or it cannot be reached."""


class UnsupportedSource(ConversionError):
    """Found, but of a kind that would not be converted faithfully."""


class BadWeights(ConversionError):
    """Tensors are missing, of a wrong shape, or not finite."""


class InvalidName(ConversionError):
    """Not a name for a model."""


class Busy(ConversionError):
    """Another conversion to the same name is at work."""


class RegistryError(ConversionError):
    """No such model or version in the repository, or one that must stay as it is."""


class NotFaithful(ConversionError):
    """Converted, but its vectors are not the source library's."""


class BadKey(ConversionError):
    """A key file that cannot be used, or that others have a hand in."""


class BadSignature(ConversionError):
    """A version that is not signed, or whose files are not those that were."""
