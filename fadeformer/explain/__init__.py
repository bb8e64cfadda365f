"""Attribution maps, their sanity checks and the pointing game."""
