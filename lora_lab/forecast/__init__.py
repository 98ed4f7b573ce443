"""How long a trial will take, and what it will cost, before it runs."""
