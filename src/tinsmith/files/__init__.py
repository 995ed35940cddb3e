"""Files of a data directory: blobs under keys, the small ones at its top, and the formats of runs and adapters."""
