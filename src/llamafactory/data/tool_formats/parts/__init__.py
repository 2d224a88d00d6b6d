"""What the tool formats share: finding calls in text, JSON calls, values without a type. No format lives here."""
