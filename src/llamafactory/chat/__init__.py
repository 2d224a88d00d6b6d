"""Talking to a model: the facade, the engines behind it, and the terminal."""
