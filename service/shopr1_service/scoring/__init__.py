"""From a request to its rewards."""
