"""What an engine loads: one module per engine, the settings and the log."""
