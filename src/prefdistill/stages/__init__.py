"""What each stage of a run does: it reads the run directory, calls the rooms, and writes the run directory."""
