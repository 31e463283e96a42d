"""Planning: which drafter is fastest for a target on a machine, and calibration of static trees."""
