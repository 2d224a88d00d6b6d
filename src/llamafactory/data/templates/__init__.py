"""Chat templates as data: every `*.toml` file here holds entries, one table a template, grouped by vendor."""
