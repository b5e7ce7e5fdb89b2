"""The command line, `mplus`: one file per command, nothing heavy imported before a command runs."""
