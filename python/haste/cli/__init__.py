"""The command `haste`."""
