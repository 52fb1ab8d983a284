"""Where the teacher's signal comes from: evaluated in the step, or stored beforehand."""
