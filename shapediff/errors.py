"""The errors shapediff raises for what a user can mend; each says what was wrong, what was found and what to do."""

from __future__ import annotations


class ShapediffError(Exception):
    """Base of every error that shapediff raises on purpose."""


class ConfigError(ShapediffError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class MeshError(ShapediffError, ValueError):
    """A mesh that cannot be read or holds no volume."""


class DataError(ShapediffError, ValueError):
    """A data set that is missing, damaged or of another format."""


class CheckpointError(ShapediffError, ValueError):
    """A checkpoint or export that is missing, damaged or does not fit."""


class TrainingError(ShapediffError):
    """A run that cannot go on, such as one whose loss is not finite."""
