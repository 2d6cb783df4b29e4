"""Private: any Pyro program, a model and its guide, to log-weights per particle and datum. It knows no objective."""
