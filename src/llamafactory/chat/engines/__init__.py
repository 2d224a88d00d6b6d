"""Inference engines, one file each, looked up by file name (`infer_backend`)."""
