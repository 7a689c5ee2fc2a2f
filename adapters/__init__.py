"""What speaks an engine's words; one package per engine, and none imports another."""
