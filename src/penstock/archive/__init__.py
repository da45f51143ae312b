"""From frames to hour files: where a file ends, who decided it, and the proof that nothing is missing."""
