"""Reports: one HTML file about a run or a sweep, made of what is in its folder."""
