"""Workarounds for faults of other libraries, one file each, with the upstream place and when to delete it."""
