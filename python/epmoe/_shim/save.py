"""What the shim has counted, as a file."""

import json
import os
import time

from epmoe.migrate import capsule

SCHEMA = "epmoe.shadow/1"


def write(path, stats, events):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        "schema": SCHEMA,
        "time": time.time(),
        "environment": capsule.environment(device),
        "kernels": {name: each for name, each in stats.items() if each["launches"] or each["fallbacks"]},
        "events": events,
    }
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w") as file:
            json.dump(_plain(found), file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _plain(value):
    """JSON has no infinities and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
