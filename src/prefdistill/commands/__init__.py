"""Commands besides the stages of a run: each parses its flags, calls a room, and says what it found."""
