"""A Pyro program as compiled code: `recording` makes a graph, `function` compiles it, `step` trains with it."""
