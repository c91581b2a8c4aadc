"""The bundle measured side by side with other servers of the same models: `make bench`."""
