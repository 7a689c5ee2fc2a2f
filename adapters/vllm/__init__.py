"""vLLM: dense attention through its registry of backends."""
