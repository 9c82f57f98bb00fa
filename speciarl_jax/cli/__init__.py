"""The command line: a page per verb, and the one place where errors become exit codes."""
