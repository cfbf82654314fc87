"""The parts of :mod:`epmoe.shim`."""
