"""The stages of a run: what each trains and on what, hand-over from one to the next."""
