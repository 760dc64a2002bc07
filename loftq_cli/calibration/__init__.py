"""Text that calibrates: what is read, and how it becomes windows of tokens."""
