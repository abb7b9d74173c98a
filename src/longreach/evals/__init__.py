"""Measurements of what a method buys, one file each. They use the library as a user does and print nothing."""
