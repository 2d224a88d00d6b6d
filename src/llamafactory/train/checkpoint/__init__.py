"""Checkpoints: written beside, verified, then renamed into place; safetensors and JSON only.

Protocol: files go to `.staging-<step>-<pid>`, each is fsynced, `MANIFEST.json` with sizes and sha256 is written last,
the folder is renamed to `checkpoint-<step>`, the parent is fsynced, the result is verified, and only then are old
checkpoints removed. Loading takes the newest checkpoint whose manifest verifies; where some exist and none does, the
run stops. `manifest`, `folders` and `state` need no torch.
"""
