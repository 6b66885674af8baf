"""One file for each op: its problem, our call, its work, what PyTorch offers, and peers."""
