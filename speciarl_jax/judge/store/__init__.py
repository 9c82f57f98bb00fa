"""What lasts of a judge's work: verdicts, logs, recordings."""
