"""Published methods, one file each, by area."""
