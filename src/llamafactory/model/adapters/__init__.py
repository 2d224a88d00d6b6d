"""Parameter-efficient methods, one file each: `Options` and `apply`. Looked up by file name (`finetuning_type`)."""
