"""The embedded checkpoint, and how it was made."""
