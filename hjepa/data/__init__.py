"""Images: where they come from, how they are held or streamed, and how they are augmented."""
