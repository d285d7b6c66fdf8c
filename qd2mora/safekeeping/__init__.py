"""What is kept safe: which files are whose, where outputs may go, and whether everything is what was written."""
