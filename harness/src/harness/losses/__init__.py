"""Row functions of next-token distributions, and their sums."""
