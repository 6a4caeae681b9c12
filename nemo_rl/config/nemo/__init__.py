"""NeMo RL's YAML (v0.3 to v0.5): what becomes of each of its keys, as tables, and who reads them."""
