"""`task=visualize`: pictures of what a run has learned."""
