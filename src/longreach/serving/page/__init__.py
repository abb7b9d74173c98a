"""The page at `/`: its files, their way to a browser, and the numbers that it draws."""
