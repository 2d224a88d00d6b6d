"""Rows of any format become token ids and masks. Only `batch` and `collate` know torch."""
