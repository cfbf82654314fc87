"""A file that is applied again when it changes."""

import os
import threading
import warnings


def _stamp(path):
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def start(path, apply, seconds):
    """Looks at the file every so many seconds on a thread of its own; returns a function that ends it."""
    ended = threading.Event()
    held = [_stamp(path)]

    def look():
        while not ended.wait(seconds):
            stamp = _stamp(path)
            if stamp is None or stamp == held[0]:
                continue
            held[0] = stamp
            try:
                apply(path)
            except Exception as error:  # a slip in a file must not end what serves
                warnings.warn(f"epmoe.shim: {path} is left unapplied: {error}", RuntimeWarning, stacklevel=1)

    thread = threading.Thread(target=look, name="epmoe-shim-watch", daemon=True)
    thread.start()

    def end():
        ended.set()
        if thread is not threading.current_thread():
            thread.join()

    return end
