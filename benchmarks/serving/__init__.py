"""The service over HTTP: bursts, weight updates, Ray Serve."""
