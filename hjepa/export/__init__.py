"""Taking a run away: its encoder in formats that others load, its features of a folder of images."""
