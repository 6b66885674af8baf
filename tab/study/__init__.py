"""Whole studies: what a comparison and a sweep are together."""
