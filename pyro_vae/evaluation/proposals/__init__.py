"""A proposal for each datum, fitted to its posterior, so that its estimate of log p(x) can be trusted."""
