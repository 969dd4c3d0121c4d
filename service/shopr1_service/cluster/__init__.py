"""The service on several devices or machines: Ray Serve starts, restarts, scales and routes (extra `ray`)."""
