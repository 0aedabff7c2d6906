"""Where items live: in memory, on disk, elsewhere, and in tiers of these."""
