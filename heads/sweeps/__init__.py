"""Many heads at once: what is asked, planned, trained together and kept, row by row."""
