"""The command `taut`."""
