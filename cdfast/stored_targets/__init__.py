"""A teacher's targets on disk: planning, making, files, and the losses on what is stored."""
