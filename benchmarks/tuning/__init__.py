"""What `taut tune` does: `problems` asks for the tiles that models need, `measure` times, `search` chooses."""
