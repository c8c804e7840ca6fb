"""Configuration: what a config may contain, which run it names, and how it becomes objects."""
