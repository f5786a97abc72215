"""What check.py runs, one file a part, each in a process of its own."""
