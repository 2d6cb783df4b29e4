"""Private: runs any Pyro program and returns its log-weights per particle and datum. It knows no objective."""
