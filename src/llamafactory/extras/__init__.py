"""Small services that every layer may use: errors, suggestions, plain log lines."""
