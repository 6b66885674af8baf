"""The watchers that come with TAB, one a file."""
