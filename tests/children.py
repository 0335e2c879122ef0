"""The environment of Python processes that tests start."""

import os
import re

_DEVICES = "--xla_force_host_platform_device_count"


def environment(devices=1):
    """This process's environment with so many virtual CPU devices; all other XLA_FLAGS stay."""
    flags = re.sub(rf"{_DEVICES}=\S*", "", os.environ.get("XLA_FLAGS", "")).split()
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"{_DEVICES}={devices}"])}
