"""The sub-commands, one file each: `main(argv) -> exit code`."""
