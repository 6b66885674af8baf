"""What draws, and knows nothing of what is drawn: figures of matplotlib, and pages with charts."""
