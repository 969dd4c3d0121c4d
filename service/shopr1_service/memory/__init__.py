"""The memory that clients take: its budget, and the sizes of what is kept."""
