"""The command line: the only place with typer, rich and exit codes."""
