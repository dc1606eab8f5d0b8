"""Known answers forced after every prefix: the tokens forced, how they travel, the values they make."""
