"""How two running systems find each other, and how bytes go from one to the other."""
