"""Files: atomic writing, the HDF5 container and its directory, checked JSON, locks. Bytes and records, no features."""
