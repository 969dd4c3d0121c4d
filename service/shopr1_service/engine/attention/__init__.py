"""Attention of packed segments to prefixes that they share."""
