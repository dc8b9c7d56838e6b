"""One file a family of baselines; importing it registers them."""
