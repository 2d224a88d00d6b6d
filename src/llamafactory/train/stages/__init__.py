"""Training stages, one file each: `Options`, pure loss functions and a `STAGE` record. Looked up by file name."""
