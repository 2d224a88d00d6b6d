"""What scores an answer: Python functions, built-in checks, reward models, a service."""
