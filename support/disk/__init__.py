"""What a program keeps: its files, their formats, a run's folder, and the command line."""
