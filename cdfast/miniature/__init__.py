"""The embedded data: scenes, worlds, questions, and how the shipped teachers are made."""
