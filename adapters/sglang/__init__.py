"""SGLang: its attention backend follows; today only the plugin's settings and log line are in place."""
