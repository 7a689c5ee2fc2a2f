"""taut-attention: attention without slack for vLLM and SGLang.

Installed beside either engine, this package offers its attention backend through the engine's own plugin hooks.
Importing it imports neither an engine nor torch.
"""

__version__ = "0.1.0"
