"""What is found out about trained and untrained models beside their accuracy."""
