"""Forward strategies: how a prompt is shared by its completions."""
