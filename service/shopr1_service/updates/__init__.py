"""Updates of the policy while it serves."""
