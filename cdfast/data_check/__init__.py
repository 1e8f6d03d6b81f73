"""What `--dry-run` reads of a data set, and how it tells."""
