"""The version of this package, as it was installed. A leaf."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("longreach")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
