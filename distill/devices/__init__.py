"""What differs between machines: processes, chips, speed, profiles."""
