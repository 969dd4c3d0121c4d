"""Forward strategies: how the completions of a group share the computation of their prompt."""
