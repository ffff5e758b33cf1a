"""Data only: one folder a hardware profile. `toolkit.profiles` reads it."""
