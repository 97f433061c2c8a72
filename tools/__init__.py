"""Tools around training: each starts alone from files, none is imported by the trainer."""
