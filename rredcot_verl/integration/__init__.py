"""The only part that knows verl and Ray."""
