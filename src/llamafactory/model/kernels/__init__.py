"""Hand-written forward and backward passes for what a stock model spends its time on; exact, and only where proven."""
