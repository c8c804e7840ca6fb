"""Looking at a run: pictures of its masks, features, attention, predictions and curves."""
