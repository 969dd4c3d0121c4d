"""The HTTP API: routes, middleware, problems."""
