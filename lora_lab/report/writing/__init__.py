"""How findings are shown: names, numbers, headline, terminal, page."""
