"""Where artifacts are measured, one file for each kind of device: a new one is a file here and a name in `DEVICES`.

What such a file has is in `_common.Device`. `host` runs every target, the others name the ones that they run.
"""

DEVICES = ("host", "android", "browser", "macos", "ios", "arm64")
