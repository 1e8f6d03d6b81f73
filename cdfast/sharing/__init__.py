"""What leaves this machine: the model card, and which files are uploaded."""
