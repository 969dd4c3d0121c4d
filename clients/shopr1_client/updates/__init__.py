"""New weights and adapters for the policy: from a model, a mapping or a checkpoint to the service."""
