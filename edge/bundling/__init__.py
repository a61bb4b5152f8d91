"""The folder that an app takes in."""
