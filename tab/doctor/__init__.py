"""What was built, which kernel runs where, and why not."""
