"""What clients make the service keep in memory."""
