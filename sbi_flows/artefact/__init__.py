"""A posterior as one file that is safe to load: `save` and `load` are in `files`."""
