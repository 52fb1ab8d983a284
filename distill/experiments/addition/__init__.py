"""Two-digit addition: teacher, student and baseline."""
