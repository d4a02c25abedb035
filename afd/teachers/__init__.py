"""What a teacher is, and the teachers: each maps (prompt, seed) to a finished video and nothing else."""
