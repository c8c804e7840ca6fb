"""`task=report`: one HTML file about a run or a sweep."""
