"""A Pyro program as compiled code."""
