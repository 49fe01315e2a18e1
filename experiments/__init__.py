"""Scripts: one question each."""
