"""A benchmark of the bundle and other servers with the same models: `make bench`."""
