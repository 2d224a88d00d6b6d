"""The configuration of a run: sections of options, how they are read, resolved and checked. No torch here."""
